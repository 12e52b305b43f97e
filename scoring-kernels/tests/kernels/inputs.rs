//! Inputs that are refused, each by name, and models that may be absent.
use crate::support::{World, backends, settings};
use superbatch_kernels::{
    Backend, Candidates, Criterion, Error, Loss, Noise, Policy, Rows, Settings, UnknownWord,
};

fn world() -> World {
    World::new(1, 20, [8, 12], 10.0, -5.0, 4)
}

fn joint(sub_batch_size: usize) -> Settings {
    settings(
        Policy::Joint,
        Loss::Sigmoid,
        Criterion::Learnability,
        sub_batch_size,
        4,
    )
}

fn refused(world: &World, settings: &Settings) -> Error {
    Backend::Native
        .select(&world.candidates(), settings, &world.given())
        .expect_err("must be refused")
}

#[test]
fn more_than_the_survivors_is_refused_and_all_of_them_is_not() {
    let world = World {
        holes: vec![3, 9],
        ..world()
    };
    assert!(matches!(
        refused(&world, &joint(19)),
        Error::TooFewCandidates {
            sub_batch_size: 19,
            candidates: 20,
            holes: 2
        }
    ));
    assert!(
        Backend::Native
            .select(&world.candidates(), &joint(18), &world.given())
            .is_ok()
    );
}

#[test]
fn settings_out_of_range_are_named() {
    let bad = [
        (joint(0), "sub_batch_size"),
        (
            Settings {
                n_chunks: 0,
                ..joint(2)
            },
            "n_chunks",
        ),
        (
            Settings {
                gain: f64::NAN,
                ..joint(2)
            },
            "gain",
        ),
    ];
    for (settings, name) in bad {
        let error = refused(&world(), &settings);
        assert!(matches!(error, Error::SettingInvalid { setting, .. } if setting == name));
    }
    // A scale of -1 is a logarithm that nobody exponentiated.
    for scale in [f64::INFINITY, 0.0, -1.0] {
        let mut blind = world();
        blind.learner.scale = scale;
        assert!(
            matches!(
                refused(&blind, &joint(2)),
                Error::SettingInvalid {
                    setting: "scale",
                    ..
                }
            ),
            "{scale}"
        );
    }
    assert!(matches!(
        "jest".parse::<Policy>(),
        Err(UnknownWord { what: "policy", .. })
    ));
    assert_eq!("softmax".parse::<Loss>().expect("a loss"), Loss::Softmax);
    assert_eq!(
        "Joint_Top_K".parse::<Policy>().expect("in any case"),
        Policy::JointTopK
    );
}

#[test]
fn shapes_that_disagree_are_named() {
    let mut short = world();
    short.reference.text.pop();
    let error = refused(&short, &joint(2));
    assert!(matches!(
        error,
        Error::ShapeMismatch {
            model: "reference",
            tower: "text",
            found: 239,
            expected: 240,
            ..
        }
    ));
    let out = World {
        holes: vec![20],
        ..world()
    };
    assert!(matches!(
        refused(&out, &joint(2)),
        Error::HoleOutOfRange {
            hole: 20,
            candidates: 20
        }
    ));
    let few = World {
        noise: vec![0.0; 60],
        ..world()
    };
    assert!(matches!(
        refused(&few, &joint(4)),
        Error::NoiseShape {
            found: 60,
            draws: 4,
            expected: 80,
            ..
        }
    ));
    assert!(
        Backend::Native
            .select(&few.candidates(), &joint(3), &few.given())
            .is_ok(),
        "three rows serve three draws"
    );
    let noise = Noise::Seeded {
        seed: 0,
        generation: 0,
        step: 0,
        keys: &[1, 2, 3],
    };
    let error = Backend::Native
        .select(&world().candidates(), &joint(2), &noise)
        .expect_err("three keys for twenty");
    assert!(matches!(
        error,
        Error::NoiseShape {
            found: 3,
            expected: 20,
            ..
        }
    ));
}

#[test]
fn a_row_that_is_not_finite_is_named_unless_it_is_a_hole() {
    let mut world = world();
    world.reference.image[7 * 12 + 3] = f32::NAN;
    world.reference.image[11 * 12] = f32::NEG_INFINITY;
    for backend in backends() {
        let error = backend
            .select(&world.candidates(), &joint(2), &world.given())
            .expect_err("NaN");
        assert!(matches!(
            error,
            Error::NotFinite {
                model: "reference",
                tower: "image",
                row: 7
            }
        ));
    }
    let half = [half::f16::INFINITY; 240];
    let mut candidates = world.candidates();
    candidates.reference.as_mut().expect("given").image = Rows::F16(&half);
    let error = Backend::Native
        .select(&candidates, &joint(2), &world.given())
        .expect_err("infinity");
    assert!(matches!(
        error,
        Error::NotFinite {
            model: "reference",
            tower: "image",
            row: 0
        }
    ));
    world.holes = vec![7, 11];
    assert!(
        Backend::Native
            .select(&world.candidates(), &joint(2), &world.given())
            .is_ok()
    );
}

#[test]
fn scores_that_overflow_are_refused() {
    let mut world = world();
    world
        .learner
        .image
        .iter_mut()
        .chain(&mut world.learner.text)
        .for_each(|value| *value = 1e30);
    let settings = Settings {
        n_chunks: 2,
        ..joint(2)
    };
    for backend in backends() {
        let error = backend
            .select(&world.candidates(), &settings, &world.given())
            .expect_err("overflow");
        assert!(
            matches!(error, Error::ScoreNotFinite { .. }),
            "{backend:?}: {error}"
        );
    }
}

#[test]
fn only_the_models_that_the_criterion_compares_with_are_needed() {
    let world = world();
    let full = world.candidates();
    let without = |learner: bool| Candidates {
        learner: full.learner.filter(|_| !learner),
        reference: full.reference.filter(|_| learner),
        ..full
    };
    for (criterion, alone, lacking, name) in [
        (Criterion::Easy, without(true), without(false), "reference"),
        (Criterion::Hard, without(false), without(true), "learner"),
    ] {
        let settings = Settings {
            criterion,
            ..joint(5)
        };
        let select = |candidates| Backend::Native.select(candidates, &settings, &world.given());
        assert_eq!(
            select(&alone).expect("enough"),
            select(&full).expect("enough")
        );
        assert!(
            matches!(select(&lacking), Err(Error::ModelMissing { model, .. }) if model == name)
        );
    }
    let bare = Candidates {
        learner: None,
        reference: None,
        ..full
    };
    let uniform = Settings {
        policy: Policy::Uniform,
        ..joint(5)
    };
    let blind = Backend::Native
        .select(&bare, &uniform, &world.given())
        .expect("noise alone");
    let seeing = Backend::Native
        .select(&full, &uniform, &world.given())
        .expect("noise alone");
    assert_eq!(blind.indices, seeing.indices);
    assert_eq!(
        (blind.batch_score, blind.mean_score_chosen, blind.flops),
        (None, None, 0.0)
    );
}

#[test]
fn ties_go_to_the_lower_index() {
    let world = World {
        noise: vec![1.0; 80],
        ..world()
    };
    let uniform = Settings {
        policy: Policy::Uniform,
        ..joint(5)
    };
    for backend in backends() {
        let ours = backend
            .select(&world.candidates(), &uniform, &world.given())
            .expect("valid");
        assert_eq!(ours.indices, [0, 1, 2, 3, 4]);
    }
}
