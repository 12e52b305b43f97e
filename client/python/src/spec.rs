//! Run specs from Python dicts. Unknown keys and values are refused, with the list of valid ones.
use crate::errors::invalid;
use pyo3::{prelude::*, types::PyDict};
use superbatch_client::v1::{
    Approximation, ComputeDtype, Criterion, Delivery, EmbeddingDtype, Fallback, Fidelity,
    FidelityProbe, Fork, Intent, Lag, LearnerSpec, Loss, MultiResolution, Phase, Policy,
    ReferenceSpec, RewindMode, RunSpec, ScoreColumn, Source, TensorDtype, Tuning,
    approximation::By, lag, learner_spec,
};

/// The keys of one dict, taken one after the other.
struct Fields<'a, 'py> {
    dict: &'a Bound<'py, PyDict>,
    /// Where the dict is in the spec, such as `phases[0].`.
    path: String,
    taken: Vec<&'static str>,
}

impl<'a, 'py> Fields<'a, 'py> {
    fn new(dict: &'a Bound<'py, PyDict>, path: impl Into<String>) -> Self {
        Self {
            dict,
            path: path.into(),
            taken: Vec::new(),
        }
    }

    fn path_of(&self, key: &str) -> String {
        format!("{}{key}", self.path)
    }

    /// Returns a value; `None` if it is absent or None.
    fn raw(&mut self, key: &'static str) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.taken.push(key);
        Ok(self.dict.get_item(key)?.filter(|value| !value.is_none()))
    }

    fn optional<T: FromPyObjectOwned<'py>>(&mut self, key: &'static str) -> PyResult<Option<T>> {
        let Some(value) = self.raw(key)? else {
            return Ok(None);
        };
        match value.extract() {
            Ok(value) => Ok(Some(value)),
            Err(error) => {
                let error: PyErr = error.into();
                let message = format!("cannot be {}: {error}", value.repr()?);
                Err(invalid(self.dict.py(), &self.path_of(key), &message))
            }
        }
    }

    /// Returns a value, or the protocol's zero, which stands for the service's default.
    fn or_default<T: FromPyObjectOwned<'py> + Default>(
        &mut self,
        key: &'static str,
    ) -> PyResult<T> {
        Ok(self.optional(key)?.unwrap_or_default())
    }

    /// As [`Self::or_default`], for numbers of which 0 is none: given, it would become the default
    /// in silence.
    fn or_default_unless_zero<T: FromPyObjectOwned<'py> + Default + PartialEq>(
        &mut self,
        key: &'static str,
    ) -> PyResult<T> {
        match self.optional::<T>(key)? {
            Some(zero) if zero == T::default() => {
                let message =
                    "cannot be 0, which the protocol reads as the default; leave it out for that";
                Err(invalid(self.dict.py(), &self.path_of(key), message))
            }
            given => Ok(given.unwrap_or_default()),
        }
    }

    fn named<E: Named>(&mut self, key: &'static str) -> PyResult<i32> {
        match self.optional::<String>(key)? {
            Some(value) => Ok(parse::<E>(self.dict.py(), &self.path_of(key), &value)?.into()),
            None => Ok(0),
        }
    }

    /// Returns a dict inside this one.
    fn nested<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&mut Fields<'_, 'py>) -> PyResult<T>,
    ) -> PyResult<Option<T>> {
        let Some(dict) = self.optional::<Bound<'py, PyDict>>(key)? else {
            return Ok(None);
        };
        let mut fields = Fields::new(&dict, format!("{}.", self.path_of(key)));
        let value = read(&mut fields)?;
        fields.finish()?;
        Ok(Some(value))
    }

    /// Returns a list of dicts inside this one.
    fn list<T>(
        &mut self,
        key: &'static str,
        read: impl Fn(&mut Fields<'_, 'py>) -> PyResult<T>,
    ) -> PyResult<Vec<T>> {
        let dicts = self.or_default::<Vec<Bound<'py, PyDict>>>(key)?;
        read_list(&dicts, &self.path_of(key), read)
    }

    /// Refuses keys that no field has taken.
    fn finish(&self) -> PyResult<()> {
        for key in self.dict.keys() {
            let key: String = key.extract()?;
            if !self.taken.contains(&key.as_str()) {
                let message = format!(
                    "there is no such key; valid ones are {}",
                    self.taken.join(", ")
                );
                return Err(invalid(self.dict.py(), &self.path_of(&key), &message));
            }
        }
        Ok(())
    }
}

fn read_list<'py, T>(
    dicts: &[Bound<'py, PyDict>],
    path: &str,
    read: impl Fn(&mut Fields<'_, 'py>) -> PyResult<T>,
) -> PyResult<Vec<T>> {
    let item = |(i, dict)| {
        let mut fields = Fields::new(dict, format!("{path}[{i}]."));
        let value = read(&mut fields)?;
        fields.finish()?;
        Ok(value)
    };
    dicts.iter().enumerate().map(item).collect()
}

/// Enums whose values are strings in Python: the protocol's names, in lower case and without their
/// prefix.
trait Named: Into<i32> + Sized {
    const PREFIX: &'static str;
    fn from_wire(name: &str) -> Option<Self>;
    fn wire(number: i32) -> Option<&'static str>;
}

macro_rules! named {
    ($($name:ident = $prefix:literal),* $(,)?) => { $(
        impl Named for $name {
            const PREFIX: &'static str = $prefix;
            fn from_wire(name: &str) -> Option<Self> {
                Self::from_str_name(name)
            }
            fn wire(number: i32) -> Option<&'static str> {
                Self::try_from(number).ok().map(|value| value.as_str_name())
            }
        }
    )* };
}

named! {
    ComputeDtype = "COMPUTE_DTYPE_",
    Criterion = "CRITERION_",
    Delivery = "DELIVERY_",
    EmbeddingDtype = "EMBEDDING_DTYPE_",
    Fallback = "FALLBACK_",
    Fidelity = "FIDELITY_",
    Intent = "INTENT_",
    Loss = "LOSS_",
    Policy = "POLICY_",
    RewindMode = "REWIND_MODE_",
    TensorDtype = "TENSOR_DTYPE_",
}

fn parse<E: Named>(py: Python<'_>, field: &str, value: &str) -> PyResult<E> {
    let known = E::from_wire(&format!("{}{}", E::PREFIX, value.to_ascii_uppercase()));
    known
        .filter(|_| !value.eq_ignore_ascii_case("unspecified"))
        .ok_or_else(|| {
            let valid: Vec<_> = (1..)
                .map_while(E::wire)
                .map(|name| name[E::PREFIX.len()..].to_lowercase())
                .collect();
            invalid(
                py,
                field,
                &format!("cannot be {value:?}; valid values are {}", valid.join(", ")),
            )
        })
}

pub(crate) fn intent(py: Python<'_>, value: &str) -> PyResult<Intent> {
    parse(py, "intent", value)
}

pub(crate) fn rewind_mode(py: Python<'_>, value: &str) -> PyResult<RewindMode> {
    parse(py, "mode", value)
}

pub(crate) fn tensor_dtype(py: Python<'_>, value: &str) -> PyResult<TensorDtype> {
    parse(py, "dtype", value)
}

pub(crate) fn phases(dicts: Vec<Bound<'_, PyDict>>) -> PyResult<Vec<Phase>> {
    read_list(&dicts, "phases", phase)
}

/// Makes a run spec of a dict with the protocol's field names.
pub(crate) fn run_spec(dict: &Bound<'_, PyDict>) -> PyResult<RunSpec> {
    let mut fields = Fields::new(dict, "");
    let spec = RunSpec {
        sources: fields.list("sources", source)?,
        learner: fields.nested("learner", learner)?,
        reference: fields.nested("reference", reference)?,
        phases: fields.list("phases", phase)?,
        loss: fields.named::<Loss>("loss")?,
        lag: fields.nested("lag", lag)?,
        push_every_steps: fields.or_default_unless_zero("push_every_steps")?,
        micro_batches: fields.or_default_unless_zero("micro_batches")?,
        columns: fields.or_default("columns")?,
        fallback: fields.named::<Fallback>("fallback")?,
        seed: fields.or_default("seed")?,
        max_ahead: fields.or_default_unless_zero("max_ahead")?,
        epochs: fields.or_default("epochs")?,
        window_blocks: fields.or_default_unless_zero("window_blocks")?,
        embedding_dtype: fields.named::<EmbeddingDtype>("embedding_dtype")?,
        micro_batch_rows: fields.or_default_unless_zero("micro_batch_rows")?,
        max_bad_row_share: fields.or_default_unless_zero("max_bad_row_share")?,
        fork_of: fields.nested("fork_of", fork)?,
        compute_dtype: fields.named::<ComputeDtype>("compute_dtype")?,
        train_flops_per_example: fields.or_default("train_flops_per_example")?,
        need_deadline_seconds: fields.or_default_unless_zero("need_deadline_seconds")?,
        stall_grace_seconds: fields.optional("stall_grace_seconds")?,
        delivery: fields.named::<Delivery>("delivery")?,
    };
    fields.finish()?;
    Ok(spec)
}

fn source(fields: &mut Fields<'_, '_>) -> PyResult<Source> {
    Ok(Source {
        uri: fields.or_default("uri")?,
        // A source without a share is left out of the list instead.
        weight: fields.or_default_unless_zero("weight")?,
        image_column: fields.or_default("image_column")?,
        caption_column: fields.or_default("caption_column")?,
        target_column: fields.or_default("target_column")?,
        text_column: fields.or_default("text_column")?,
        r#where: fields.or_default("where")?,
        allow: fields.or_default("allow")?,
        id_column: fields.or_default("id_column")?,
        scores: fields.or_default("scores")?,
        caption_seed: fields.optional("caption_seed")?,
        image_root: fields.or_default("image_root")?,
    })
}

fn learner(fields: &mut Fields<'_, '_>) -> PyResult<LearnerSpec> {
    use learner_spec::Initial;
    let model_uri = fields.or_default("model_uri")?;
    let initial = [
        fields.optional("random_seed")?.map(Initial::RandomSeed),
        fields.optional("snapshot_uri")?.map(Initial::SnapshotUri),
        fields
            .optional::<bool>("first_push")?
            .filter(|on| *on)
            .map(Initial::FirstPush),
    ];
    let mut given = initial.into_iter().flatten();
    let initial = given.next();
    if given.next().is_some() {
        let message = "give one of random_seed, snapshot_uri and first_push";
        return Err(invalid(
            fields.dict.py(),
            &fields.path_of("initial"),
            message,
        ));
    }
    Ok(LearnerSpec {
        model_uri,
        initial,
        logit_bias: fields.optional("logit_bias")?,
        trained_fidelities: fields.list("trained_fidelities", approximation)?,
    })
}

fn approximation(fields: &mut Fields<'_, '_>) -> PyResult<Approximation> {
    let given = [
        fields.optional("resolution")?.map(By::Resolution),
        fields.optional("patch")?.map(By::Patch),
        fields.optional("patch_dropout")?.map(By::PatchDropout),
        fields.optional("layers")?.map(By::Layers),
    ];
    let mut given = given.into_iter().flatten();
    let by = given.next();
    if given.next().is_some() {
        let message = "an approximation is one of resolution, patch, patch_dropout and layers";
        return Err(invalid(
            fields.dict.py(),
            &fields.path_of("resolution"),
            message,
        ));
    }
    Ok(Approximation { by })
}

fn multi_resolution(fields: &mut Fields<'_, '_>) -> PyResult<MultiResolution> {
    Ok(MultiResolution {
        share: fields.or_default_unless_zero("share")?,
        whole_step: fields.or_default("whole_step")?,
    })
}

fn probe(fields: &mut Fields<'_, '_>) -> PyResult<FidelityProbe> {
    Ok(FidelityProbe {
        every_steps: fields.or_default("every_steps")?,
        rows: fields.or_default_unless_zero("rows")?,
    })
}

fn reference(fields: &mut Fields<'_, '_>) -> PyResult<ReferenceSpec> {
    Ok(ReferenceSpec {
        model_uri: fields.or_default("model_uri")?,
        logit_bias: fields.optional("logit_bias")?,
    })
}

fn phase(fields: &mut Fields<'_, '_>) -> PyResult<Phase> {
    Ok(Phase {
        from_step: fields.or_default("from_step")?,
        policy: fields.named::<Policy>("policy")?,
        criterion: fields.named::<Criterion>("criterion")?,
        super_batch_size: fields.or_default("super_batch_size")?,
        sub_batch_size: fields.or_default("sub_batch_size")?,
        n_chunks: fields.or_default_unless_zero("n_chunks")?,
        gain: fields.or_default_unless_zero("gain")?,
        fidelity: fields.named::<Fidelity>("fidelity")?,
        tuning: fields.nested("tuning", tuning)?,
        approximation: fields.nested("approximation", approximation)?,
        multi_resolution: fields.nested("multi_resolution", multi_resolution)?,
        allow_untrained_fidelity: fields.or_default("allow_untrained_fidelity")?,
        probe: fields.nested("probe", probe)?,
        score_columns: fields.list("score_columns", score_column)?,
        reference_step: fields.optional("reference_step")?,
        token_share: fields.optional("token_share")?,
    })
}

fn score_column(fields: &mut Fields<'_, '_>) -> PyResult<ScoreColumn> {
    Ok(ScoreColumn {
        name: fields.or_default("name")?,
        weight: fields.optional("weight")?,
        at_least: fields.optional("at_least")?,
        at_most: fields.optional("at_most")?,
        missing: fields.optional("missing")?,
    })
}

fn tuning(fields: &mut Fields<'_, '_>) -> PyResult<Tuning> {
    Ok(Tuning {
        temperature: fields.optional("temperature")?,
        pressure: fields.optional("pressure")?,
        priority_exponent: fields.optional("priority_exponent")?,
        weight_exponent: fields.optional("weight_exponent")?,
        clip_score_at_least: fields.optional("clip_score_at_least")?,
        neg_clip_loss_keep: fields.optional("neg_clip_loss_keep")?,
        duplicates_above: fields.optional("duplicates_above")?,
    })
}

fn lag(fields: &mut Fields<'_, '_>) -> PyResult<Lag> {
    let exact = fields.optional("exact")?.map(lag::Bound::Exact);
    let at_most = fields.optional("at_most")?.map(lag::Bound::AtMost);
    match (exact, at_most) {
        (Some(bound), None) | (None, Some(bound)) => Ok(Lag { bound: Some(bound) }),
        _ => Err(invalid(
            fields.dict.py(),
            "lag",
            "give one of exact and at_most",
        )),
    }
}

fn fork(fields: &mut Fields<'_, '_>) -> PyResult<Fork> {
    Ok(Fork {
        run_id: fields.or_default("run_id")?,
        step: fields.or_default("step")?,
    })
}
