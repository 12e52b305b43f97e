//! What settings go together, and what values they may have. The kernels check it; a service that
//! takes settings long before it draws can ask it ahead.
use crate::{
    error::{Error, Result},
    types::{Criterion, Policy, Settings, Tuning},
};

/// A number of [`Tuning`]: which policy reads it, and what it may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Number {
    /// The field of [`Tuning`].
    pub name: &'static str,
    /// The only policy that reads it, while all other policies ignore it; `None` if it is a rule
    /// that leaves candidates out under every policy.
    pub reader: Option<Policy>,
    least: f64,
    most: f64,
    must: &'static str,
}

const RATIO: &str = "at least 1e-9 and at most 1e9";

impl Number {
    /// All numbers. Beyond the bounds of temperature, pressure and exponents, scores and chances
    /// overflow in the arithmetic of the draw; long before, the draw is the one of `top_k` or of
    /// `uniform`.
    pub const ALL: [Self; 7] = [
        Self::read_by(Policy::Independent, "temperature", 1e-9, 1e9, RATIO),
        Self::read_by(Policy::Rank, "pressure", 1e-9, 1e9, RATIO),
        Self::read_by(
            Policy::Proportional,
            "priority_exponent",
            0.0,
            100.0,
            "at least 0 and at most 100",
        ),
        Self::read_by(
            Policy::Proportional,
            "weight_exponent",
            0.0,
            1.0,
            "at least 0 and at most 1",
        ),
        // 2.5 is the CLIPScore of an image and a text with the same embedding.
        Self::rule(
            "clip_score_at_least",
            0.0,
            2.5,
            "at least 0 and at most 2.5",
        ),
        Self::rule(
            "neg_clip_loss_keep",
            f64::MIN_POSITIVE,
            1.0,
            "above 0 and at most 1",
        ),
        Self::rule("duplicates_above", -1.0, 1.0, "at least -1 and at most 1"),
    ];

    const fn read_by(
        policy: Policy,
        name: &'static str,
        least: f64,
        most: f64,
        must: &'static str,
    ) -> Self {
        Self {
            name,
            reader: Some(policy),
            least,
            most,
            must,
        }
    }

    const fn rule(name: &'static str, least: f64, most: f64, must: &'static str) -> Self {
        Self {
            name,
            reader: None,
            least,
            most,
            must,
        }
    }

    /// Returns the number of a field of [`Tuning`].
    pub fn of(name: &str) -> Option<&'static Self> {
        const ALL: &[Number] = &Number::ALL;
        ALL.iter().find(|number| number.name == name)
    }

    /// # Errors
    /// [`Error::SettingInvalid`] if the value is out of range or not finite.
    pub fn check(&self, value: f64) -> Result<()> {
        if (self.least..=self.most).contains(&value) {
            return Ok(());
        }
        Err(Error::SettingInvalid {
            setting: self.name,
            value: value.to_string(),
            must: self.must,
        })
    }

    /// Checks that a number that was given has an effect.
    ///
    /// # Errors
    /// [`Error::NumberUnread`] if only another policy reads it.
    pub fn check_reader(&self, policy: Policy) -> Result<()> {
        match self.reader {
            Some(reader) if reader != policy => Err(Error::NumberUnread {
                setting: self.name,
                reader,
                policy,
            }),
            _ => Ok(()),
        }
    }
}

impl Policy {
    /// # Errors
    /// [`Error::SettingInvalid`] if the policy cannot draw by the criterion's scores.
    pub fn check_criterion(self, criterion: Criterion) -> Result<()> {
        if (self, criterion) != (Self::Proportional, Criterion::Easy) {
            return Ok(());
        }
        Err(Error::SettingInvalid {
            setting: "criterion",
            value: criterion.to_string(),
            must: "hard or learnability under the proportional policy: easy scores are never \
                   positive",
        })
    }
}

impl Tuning {
    /// # Errors
    /// [`Error::SettingInvalid`] by the first number that is out of range.
    pub fn check(&self) -> Result<()> {
        Number::ALL
            .iter()
            .try_for_each(|number| self.value(number.name).map_or(Ok(()), |v| number.check(v)))
    }

    fn value(&self, name: &str) -> Option<f64> {
        match name {
            "temperature" => Some(self.temperature),
            "pressure" => Some(self.pressure),
            "priority_exponent" => Some(self.priority_exponent),
            "weight_exponent" => Some(self.weight_exponent),
            "clip_score_at_least" => self.clip_score_at_least,
            "neg_clip_loss_keep" => self.neg_clip_loss_keep,
            _ => self.duplicates_above,
        }
    }
}

impl Settings {
    /// Returns the number of chunks that are drawn with noise: the rows of [`Noise::Given`].
    ///
    /// [`Noise::Given`]: crate::Noise::Given
    pub fn noisy_draws(&self) -> usize {
        let chunks = if self.policy.goes_by_chunks() {
            self.n_chunks.min(self.sub_batch_size)
        } else {
            1
        };
        (0..chunks)
            .filter(|&chunk| self.policy.is_noisy(chunk))
            .count()
    }
}

/// The models that a draw reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// The learner, for its losses.
    pub learner: bool,
    /// The reference, for its losses.
    pub reference_losses: bool,
    /// The reference for any purpose: the rules that leave candidates out, and k-center's
    /// distances, read its embeddings too.
    pub reference: bool,
}

impl Needs {
    /// Returns what a draw reads. `criterion` is absent if terms alone are the scores.
    pub fn of(policy: Policy, criterion: Option<Criterion>, tuning: &Tuning) -> Self {
        let scored = criterion.filter(|_| policy.is_scored());
        let reference_losses = scored.is_some_and(Criterion::needs_reference);
        Self {
            learner: scored.is_some_and(Criterion::needs_learner),
            reference_losses,
            reference: reference_losses || policy == Policy::KCenter || tuning.leaves_out(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_one_of_tuning_and_its_default_fits() {
        let all = Tuning {
            clip_score_at_least: Some(1.0),
            neg_clip_loss_keep: Some(0.5),
            duplicates_above: Some(0.25),
            ..Tuning::default()
        };
        let values: Vec<_> = Number::ALL.iter().map(|n| all.value(n.name)).collect();
        let expected = [1.0, 100.0, 0.6, 0.4, 1.0, 0.5, 0.25].map(Some);
        assert_eq!(values, expected);
        all.check().unwrap();
    }

    #[test]
    fn bounds_belong_to_the_range_and_what_is_beyond_does_not() {
        for number in Number::ALL {
            for inside in [number.least, number.most] {
                number.check(inside).unwrap();
            }
            let beyond = number.most * 1.001;
            for outside in [f64::NAN, f64::INFINITY, number.least - 0.001, beyond] {
                let refused = number.check(outside).unwrap_err().to_string();
                assert!(refused.starts_with(number.name), "{refused}");
                assert!(refused.ends_with(number.must), "{refused}");
            }
        }
    }

    #[test]
    fn models_are_read_for_losses_rules_and_distances() {
        let plain = Tuning::default();
        let needs = |policy, criterion, tuning| {
            let Needs {
                learner,
                reference_losses,
                reference,
            } = Needs::of(policy, criterion, tuning);
            [learner, reference_losses, reference]
        };
        let hard = Some(Criterion::Hard);
        assert_eq!(needs(Policy::Joint, hard, &plain), [true, false, false]);
        let easy = Some(Criterion::Easy);
        assert_eq!(needs(Policy::TopK, easy, &plain), [false, true, true]);
        assert_eq!(needs(Policy::Uniform, easy, &plain), [false; 3]);
        assert_eq!(needs(Policy::KCenter, hard, &plain), [false, false, true]);
        assert_eq!(needs(Policy::TopK, None, &plain), [false; 3]);
        let rule = Tuning {
            duplicates_above: Some(0.9),
            ..Tuning::default()
        };
        assert_eq!(needs(Policy::Joint, hard, &rule), [true, false, true]);
    }

    #[test]
    fn noise_is_counted_by_the_chunks_that_read_it() {
        let draws = |policy| {
            let settings = Settings {
                policy,
                sub_batch_size: 10,
                n_chunks: 4,
                ..Settings::default()
            };
            settings.noisy_draws()
        };
        assert_eq!(draws(Policy::Joint), 4);
        assert_eq!(draws(Policy::JointTopK), 0);
        assert_eq!(draws(Policy::KCenter), 1);
        assert_eq!(draws(Policy::Uniform), 1);
    }
}
