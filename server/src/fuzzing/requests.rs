//! Messages of both planes, through the checks of those who read them.
use super::{Input, read, read_own, wait};
use crate::{
    coordinator::{
        runs::reported,
        score::received::Received,
        spec,
        trainer::ranks::{Asking, Bounds, Members, check_incarnation},
        weights::by_uri,
        workers::{
            pool::{Home, Pool},
            replies,
        },
    },
    selection::{self, Embedded, Values},
    ticket::TicketKey,
};
use prost::Message;
use std::{
    collections::BTreeSet,
    time::{Duration, Instant, SystemTime},
};
use superbatch_kernels::Backend;
use superbatch_proto::{
    reflect,
    v1::{
        EmbedDone, EmbeddingDtype, EmbeddingPart, Holes, Intent, Phase, PrepareModelResponse,
        PushStart, RegisterRequest, ReportLossesRequest, RunSpec, SelectBatchRequest, SelectBegin,
        SelectResponse, TicketClaims,
    },
};

/// Candidates that are drawn from.
const CANDIDATES_MAX: usize = 256;

/// A message after a byte that says of which kind, through the checks of those who read it.
pub fn requests(bytes: &[u8]) {
    let mut input = Input(bytes);
    match input.byte() % 10 {
        0 => run_spec(&mut input),
        1 => more_phases(&mut input),
        2 => ranks(&mut input),
        3 => push_start(&mut input),
        4 => {
            if let Ok(request) = ReportLossesRequest::decode(input.0) {
                read(reported::check(&request));
            }
        }
        5 => register(&mut input),
        6 => worker_replies(&mut input),
        7 => embeddings(&mut input),
        8 => draw(&mut input),
        _ => ticket(&mut input),
    }
}

fn run_spec(input: &mut Input<'_>) {
    let Ok(asked) = RunSpec::decode(input.0) else {
        return;
    };
    let Some(spec) = read(spec::complete(asked, 60.0)) else {
        return;
    };
    let again = spec::complete(spec.clone(), 30.0).expect("a completed spec is a spec");
    let differs = spec::first_difference(&spec, &again);
    assert_eq!(differs, None, "a completed spec is complete");
    let json = reflect::to_json(&spec);
    let kept: RunSpec = reflect::from_json(json).expect("it was written just now");
    assert_eq!(spec::first_difference(&spec, &kept), None);
    for step in [0, 1, u64::MAX] {
        let phase = spec::phase_at(&spec.phases, step);
        spec::probes_at(phase, step);
        spec::references_from(&spec.phases, step);
        spec::low_rows(
            phase.multi_resolution.as_ref(),
            phase.sub_batch_size as usize,
        );
    }
}

fn more_phases(input: &mut Input<'_>) {
    let Some(asked) = input.message::<RunSpec>() else {
        return;
    };
    let Ok(spec) = spec::complete(asked, 60.0) else {
        return;
    };
    let phases: Vec<Phase> = std::iter::from_fn(|| input.message()).collect();
    let Some(more) = read(spec::append_phases(spec, phases.clone(), Some(3))) else {
        return;
    };
    let again = spec::append_phases(more.clone(), phases, Some(u64::MAX));
    let again = again.expect("a call that is repeated changes nothing");
    assert_eq!(spec::first_difference(&more, &again), None);
}

fn ranks(input: &mut Input<'_>) {
    let mut members = Members::new(Vec::new(), None);
    let mut committed = None;
    while let Some(asked) = input.message::<SelectBatchRequest>() {
        if read(check_incarnation(&asked.incarnation)).is_none() {
            continue;
        }
        let need = asked.intent() == Intent::Need;
        let asking = Asking {
            step: asked.step,
            rank: asked.rank,
            world_size: asked.world_size,
            incarnation: asked.incarnation,
            need,
            consumed_through: asked.consumed_through,
            held: asked.held_steps,
        };
        let bounds = Bounds {
            committed,
            max_ahead: 2,
        };
        if read(members.admit(&asking, bounds)).is_some() {
            committed = committed.max(Some(asking.step));
        }
        let consumed = (members.consumed_by_all(), members.frontier());
        assert!(
            consumed.0 <= consumed.1 && consumed.1 <= committed,
            "{consumed:?}"
        );
    }
}

fn push_start(input: &mut Input<'_>) {
    let Ok(start) = PushStart::decode(input.0) else {
        return;
    };
    read(by_uri::check(&start));
    read(check_incarnation(&start.incarnation));
}

fn register(input: &mut Input<'_>) {
    wait(async {
        let pool = Pool::new(Duration::from_secs(9), Duration::ZERO, Home::default());
        let now = Instant::now();
        while let Some(request) = input.message::<RegisterRequest>() {
            let registered = read(pool.register(&request, now)).is_some();
            let live = pool.live(now);
            let mut at = live.iter().filter(|w| w.address == request.address);
            let is_there = if request.leaving {
                // Of another process at that address nothing is said.
                at.any(|w| w.incarnation == request.incarnation)
            } else {
                at.next().is_some()
            };
            assert!(!registered || is_there != request.leaving, "{request:?}");
        }
    });
}

fn worker_replies(input: &mut Input<'_>) {
    match input.byte() % 3 {
        0 => {
            if let Ok(model) = PrepareModelResponse::decode(input.0) {
                read_own(replies::check_model(&model));
            }
        }
        1 => {
            if let Ok(done) = EmbedDone::decode(input.0) {
                read_own(replies::check_done(&done, 4));
            }
        }
        _ => {
            let holes = Holes::decode(input.0).unwrap_or_default().holes;
            let holes = read_own(replies::checked_holes(holes, 4)).unwrap_or_default();
            assert!(holes.len() <= 4 && holes.iter().all(|hole| hole.candidate < 4));
        }
    }
}

fn embeddings(input: &mut Input<'_>) {
    let dim = u32::from(input.byte() % 4);
    let mut received = Received::new(2..10, EmbeddingDtype::F16, (dim > 0).then_some(dim));
    let done = input.message::<EmbedDone>().unwrap_or_default();
    while let Some(part) = input.message::<EmbeddingPart>() {
        read_own(received.place(&part));
    }
    if let Some(whole) = read_own(received.finish(done, 10, |candidate| candidate > 4)) {
        let rows = |bytes: &[u8]| bytes.len() / (2 * whole.dim);
        let held: usize = whole.parts.iter().map(|part| rows(&part.image)).sum();
        assert_eq!(held, 8);
    }
}

/// Draws from made-up embeddings, and checks the draw as that of a worker.
fn draw(input: &mut Input<'_>) {
    let answered = input.byte().is_multiple_of(2);
    let Some(begin) = input.message::<SelectBegin>() else {
        return;
    };
    if begin.positions.len() > CANDIDATES_MAX {
        return;
    }
    if answered {
        let answer = SelectResponse::decode(input.0).unwrap_or_default();
        read_own(replies::check_selected(&begin, &answer));
        return;
    }
    let number = |n: usize| (n * 37 % 101) as f32 / 101.0 - 0.5;
    let values = |seed: usize| {
        let all = (0..begin.positions.len() * 4).map(|n| number(n + seed));
        Values::F32(all.collect())
    };
    let [learner, reference] = [1, 5].map(|seed| Embedded {
        image: values(seed),
        text: values(seed + 2),
        dim: 4,
    });
    let drawn = selection::draw(Backend::Native, &begin, Some(&learner), Some(&reference));
    let Some(drawn) = read(drawn) else { return };
    let mut seen = BTreeSet::new();
    for index in &drawn.indices {
        assert!((*index as usize) < begin.positions.len() && !begin.holes.contains(index));
        assert!(seen.insert(*index), "{index} is drawn twice");
    }
}

fn ticket(input: &mut Input<'_>) {
    let key = TicketKey::from_bytes(&[7; 32]).expect("a key has 32 bytes");
    assert!(read(key.open(input.0, SystemTime::UNIX_EPOCH)).is_none());
    // What a signature vouches for is decoded too.
    if let Ok(claims) = TicketClaims::decode(input.0) {
        let opened = read(key.open(&key.sign(&claims), SystemTime::UNIX_EPOCH));
        assert_eq!(opened.map(|opened| opened.rows), Some(claims.rows));
    }
}
