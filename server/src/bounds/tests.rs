use super::*;
use crate::coordinator::{
    spec,
    trainer::ranks::check_incarnation,
    weights::by_uri::check as check_push,
    workers::{
        pool::{Home, Pool},
        replies::{check_done, check_model, check_selected, checked_holes},
    },
};
use prost::Message;
use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    time::{Duration, Instant},
};
use superbatch_proto::{
    SUPER_BATCH_SIZE_MAX,
    v1::{
        Approximation, EmbedDone, FILE_DESCRIPTOR_SET, Hole, ImageTower, LearnerSpec,
        MultiResolution, Phase, Policy, PrepareModelResponse, PushStart, Reason, ReferenceSpec,
        RegisterRequest, RunSpec, SelectBegin, SelectResponse, Source, TensorInfo, Tuning,
        approximation::By, learner_spec::Initial,
    },
};

/// What is done about one field.
enum How {
    /// It is bounded: this call, with a value beyond the bound, is refused and names it so.
    Bound(&'static str, fn() -> Result<()>),
    /// It is bounded, and the test of this name refuses what is beyond.
    Tested(&'static str),
    /// It sizes nothing, for this reason.
    Free(&'static str),
    /// A message, whose fields are in the table.
    Message,
}
use How::{Bound, Free, Tested};

fn column(name: &str) -> superbatch_proto::v1::ScoreColumn {
    superbatch_proto::v1::ScoreColumn {
        name: name.to_owned(),
        ..Default::default()
    }
}

const ENUM: &str = "an enum: what it does not know is refused or means its zero";
const FLAG: &str = "a flag";
const KEY: &str = "a number that is compared, hashed or quoted, and counts nothing";
const NUMBER: &str = "arithmetic alone; that it is finite is checked";
const SIGNED: &str = "read only after the coordinator's signature was verified";
const BYTES: &str = "no more than a message holds";

/// Messages that only a coordinator or a client of the public plane makes and that no process of
/// the service reads.
const SENT: [&str; 36] = [
    "ReportLossesResponse",
    "GetWeightsDigestsResponse",
    "KeptWeights",
    "ListWeightsResponse",
    "RollBackWeightsResponse",
    "TensorDigest",
    "ProbeResult",
    "Accounts",
    "AnnouncePushResponse",
    "AppendPhasesResponse",
    "BadRow",
    "BatchHeader",
    "BatchTrailer",
    "ChosenRow",
    "CloseRunResponse",
    "GetReceiptResponse",
    "GetRunResponse",
    "ListRunsRequest",
    "ListRunsResponse",
    "OpenRunResponse",
    "PassedRow",
    "PushWeightsResponse",
    "Receipt",
    "ReceiptSummary",
    "RewindResponse",
    "RunInfo",
    "RunSummary",
    "SelectBatchResponse",
    "SourceSpan",
    "Ticket",
    "TicketDone",
    "FetchTicketResponse",
    "StageSeconds",
    "TowerFlops",
    "WeightsVersion",
    // Counts that are written down, and nothing else.
    "LeftOut",
];

fn long(bytes: usize) -> String {
    "x".repeat(bytes + 1)
}

fn refused(change: impl Fn(&mut RunSpec)) -> Result<()> {
    let phase = |from_step, policy: Policy| Phase {
        from_step,
        policy: policy.into(),
        super_batch_size: 64,
        sub_batch_size: 16,
        ..Default::default()
    };
    let mut asked = RunSpec {
        sources: vec![Source {
            uri: "memory:///data".into(),
            ..Default::default()
        }],
        learner: Some(LearnerSpec {
            model_uri: "memory:///learner".into(),
            initial: Some(Initial::RandomSeed(0)),
            ..Default::default()
        }),
        reference: Some(ReferenceSpec {
            model_uri: "memory:///reference".into(),
            logit_bias: None,
        }),
        phases: vec![
            phase(0, Policy::Independent),
            phase(1, Policy::Rank),
            phase(2, Policy::Proportional),
        ],
        ..Default::default()
    };
    spec::complete(asked.clone(), 60.0)?;
    change(&mut asked);
    spec::complete(asked, 60.0).map(drop)
}

fn tuned(phase: usize, change: impl Fn(&mut Tuning)) -> Result<()> {
    refused(|spec| change(spec.phases[phase].tuning.get_or_insert_default()))
}

fn by_uri(change: impl Fn(&mut PushStart)) -> Result<()> {
    let mut start = PushStart {
        snapshot_uri: "memory:///w.safetensors".into(),
        ..Default::default()
    };
    check_push(&start)?;
    change(&mut start);
    check_push(&start)
}

fn registered(change: impl Fn(&mut RegisterRequest)) -> Result<()> {
    let mut request = RegisterRequest {
        address: "http://127.0.0.1:1".into(),
        ..Default::default()
    };
    change(&mut request);
    let pool = Pool::new(Duration::from_secs(9), Duration::ZERO, Home::default());
    pool.register(&request, Instant::now())
}

fn modelled(change: impl Fn(&mut PrepareModelResponse)) -> Result<()> {
    let mut model = PrepareModelResponse {
        embedding_dim: 512,
        logit_scale: 10.0,
        image_tower: Some(ImageTower::default()),
        tensors: vec![TensorInfo::default()],
        ..Default::default()
    };
    check_model(&model)?;
    change(&mut model);
    check_model(&model)
}

fn towered(change: impl Fn(&mut ImageTower)) -> Result<()> {
    modelled(|model| change(model.image_tower.get_or_insert_default()))
}

fn done(change: impl Fn(&mut EmbedDone)) -> Result<()> {
    let mut done = EmbedDone::default();
    change(&mut done);
    check_done(&done, 4)
}

fn selected(change: impl Fn(&mut SelectResponse)) -> Result<()> {
    let begin = SelectBegin {
        policy: Policy::Joint.into(),
        sub_batch_size: 2,
        positions: vec![7, 8, 9],
        ..Default::default()
    };
    let mut response = SelectResponse {
        indices: vec![0, 1],
        ..Default::default()
    };
    check_selected(&begin, &response)?;
    change(&mut response);
    check_selected(&begin, &response)
}

/// Every field of every message that a process of the service reads off the wire.
const FIELDS: &[(&str, How)] = &[
    // Opening runs.
    (
        "OpenRunRequest.run_id",
        Tested("run_ids_are_safe_object_keys"),
    ),
    ("OpenRunRequest.spec", How::Message),
    (
        "RunSpec.sources",
        Bound("sources", || {
            refused(|s| s.sources = vec![s.sources[0].clone(); SOURCES_MAX + 1])
        }),
    ),
    ("RunSpec.learner", How::Message),
    ("RunSpec.reference", How::Message),
    (
        "RunSpec.phases",
        Bound("phases", || {
            refused(|s| s.phases = vec![s.phases[0].clone(); PHASES_MAX + 1])
        }),
    ),
    ("RunSpec.loss", Free(ENUM)),
    ("RunSpec.lag", How::Message),
    (
        "RunSpec.push_every_steps",
        Free("arithmetic on steps; what is walked is STEPS_MAX long"),
    ),
    (
        "RunSpec.micro_batches",
        Bound("phases[0].sub_batch_size", || {
            refused(|s| s.micro_batches = 17)
        }),
    ),
    (
        "RunSpec.columns",
        Bound("columns", || {
            refused(|s| s.columns = (0..=COLUMNS_MAX).map(|n| n.to_string()).collect())
        }),
    ),
    ("RunSpec.fallback", Free(ENUM)),
    ("RunSpec.seed", Free(KEY)),
    (
        "RunSpec.max_ahead",
        Bound("max_ahead", || refused(|s| s.max_ahead = MAX_AHEAD_MAX + 1)),
    ),
    (
        "RunSpec.epochs",
        Free("a bound on the plan, never walked; the search is EPOCHS_MAX long"),
    ),
    (
        "RunSpec.window_blocks",
        Bound("window_blocks", || {
            refused(|s| s.window_blocks = WINDOW_BLOCKS_MAX + 1)
        }),
    ),
    ("RunSpec.embedding_dtype", Free(ENUM)),
    (
        "RunSpec.micro_batch_rows",
        Bound("micro_batch_rows", || {
            refused(|s| s.micro_batch_rows = MICRO_BATCH_ROWS_MAX + 1)
        }),
    ),
    (
        "RunSpec.max_bad_row_share",
        Bound("max_bad_row_share", || {
            refused(|s| s.max_bad_row_share = 1.5)
        }),
    ),
    ("RunSpec.fork_of", How::Message),
    ("RunSpec.compute_dtype", Free(ENUM)),
    (
        "RunSpec.train_flops_per_example",
        Bound("train_flops_per_example", || {
            refused(|s| s.train_flops_per_example = f64::INFINITY)
        }),
    ),
    (
        "RunSpec.need_deadline_seconds",
        Bound("need_deadline_seconds", || {
            refused(|s| s.need_deadline_seconds = 2.0 * SECONDS_MAX)
        }),
    ),
    (
        "RunSpec.stall_grace_seconds",
        Bound("stall_grace_seconds", || {
            refused(|s| s.stall_grace_seconds = Some(2.0 * SECONDS_MAX))
        }),
    ),
    ("RunSpec.delivery", Free(ENUM)),
    (
        "Source.uri",
        Bound("sources[0].uri", || {
            refused(|s| s.sources[0].uri = long(NAME_BYTES_MAX))
        }),
    ),
    (
        "Source.weight",
        Bound("sources[0].weight", || {
            refused(|s| s.sources[0].weight = f64::INFINITY)
        }),
    ),
    (
        "Source.image_column",
        Bound("sources[0].image_column", || {
            refused(|s| s.sources[0].image_column = long(NAME_BYTES_MAX))
        }),
    ),
    (
        "Source.caption_column",
        Bound("sources[0].caption_column", || {
            refused(|s| s.sources[0].caption_column = long(NAME_BYTES_MAX))
        }),
    ),
    ("Source.caption_seed", Free(KEY)),
    (
        "Source.where",
        Bound("sources[0].where", || {
            refused(|s| s.sources[0].r#where = long(NAME_BYTES_MAX))
        }),
    ),
    (
        "Source.allow",
        Bound("sources[0].allow", || {
            refused(|s| s.sources[0].allow = long(NAME_BYTES_MAX))
        }),
    ),
    (
        "Source.id_column",
        Bound("sources[0].id_column", || {
            refused(|s| s.sources[0].id_column = long(NAME_BYTES_MAX))
        }),
    ),
    (
        "Source.scores",
        Bound("sources[0].scores", || {
            refused(|s| s.sources[0].scores = long(NAME_BYTES_MAX))
        }),
    ),
    (
        "Source.target_column",
        Bound("sources[0].target_column", || {
            refused(|s| s.sources[0].target_column = long(NAME_BYTES_MAX))
        }),
    ),
    (
        "Source.text_column",
        Bound("sources[0].text_column", || {
            refused(|s| s.sources[0].text_column = long(NAME_BYTES_MAX))
        }),
    ),
    (
        "Source.image_root",
        Bound("sources[0].image_root", || {
            refused(|s| s.sources[0].image_root = long(NAME_BYTES_MAX))
        }),
    ),
    (
        "LearnerSpec.model_uri",
        Bound("learner.model_uri", || {
            refused(|s| s.learner.get_or_insert_default().model_uri = long(NAME_BYTES_MAX))
        }),
    ),
    ("LearnerSpec.random_seed", Free(KEY)),
    (
        "LearnerSpec.snapshot_uri",
        Bound("learner.snapshot_uri", || {
            refused(|s| {
                let initial = Some(Initial::SnapshotUri(long(NAME_BYTES_MAX)));
                s.learner.get_or_insert_default().initial = initial;
            })
        }),
    ),
    ("LearnerSpec.first_push", Free(FLAG)),
    (
        "LearnerSpec.logit_bias",
        Bound("learner.logit_bias", || {
            refused(|s| s.learner.get_or_insert_default().logit_bias = Some(f64::NAN))
        }),
    ),
    (
        "LearnerSpec.trained_fidelities",
        Bound("learner.trained_fidelities", || {
            let low = Approximation {
                by: Some(By::Resolution(8)),
            };
            refused(|s| {
                s.learner.get_or_insert_default().trained_fidelities =
                    vec![low; FIDELITIES_MAX + 1];
            })
        }),
    ),
    (
        "ReferenceSpec.model_uri",
        Bound("reference.model_uri", || {
            refused(|s| s.reference.get_or_insert_default().model_uri = long(NAME_BYTES_MAX))
        }),
    ),
    (
        "ReferenceSpec.logit_bias",
        Bound("reference.logit_bias", || {
            refused(|s| s.reference.get_or_insert_default().logit_bias = Some(f64::INFINITY))
        }),
    ),
    (
        "Phase.from_step",
        Free("compared; products with it saturate"),
    ),
    ("Phase.policy", Free(ENUM)),
    ("Phase.criterion", Free(ENUM)),
    (
        "Phase.super_batch_size",
        Bound("phases[0].super_batch_size", || {
            refused(|s| s.phases[0].super_batch_size = SUPER_BATCH_SIZE_MAX + 1)
        }),
    ),
    (
        "Phase.sub_batch_size",
        Bound("phases[0].sub_batch_size", || {
            refused(|s| s.phases[0].sub_batch_size = 65)
        }),
    ),
    (
        "Phase.n_chunks",
        Free("more chunks than rows are as many as rows"),
    ),
    (
        "Phase.gain",
        Bound("phases[0].gain", || {
            refused(|s| s.phases[0].gain = f64::INFINITY)
        }),
    ),
    ("Phase.fidelity", Free(ENUM)),
    ("Phase.tuning", How::Message),
    ("Phase.approximation", How::Message),
    ("Phase.multi_resolution", How::Message),
    ("Phase.allow_untrained_fidelity", Free(FLAG)),
    (
        "Phase.reference_step",
        Bound("phases[0].reference_step", || {
            refused(|s| s.phases[0].reference_step = Some(u64::MAX))
        }),
    ),
    (
        "Phase.token_share",
        Bound("phases[0].token_share", || {
            refused(|s| s.phases[0].token_share = Some(1.5))
        }),
    ),
    ("Phase.probe", How::Message),
    (
        "FidelityProbe.every_steps",
        Free("steps are counted by it, and nothing is sized"),
    ),
    (
        "FidelityProbe.rows",
        Free("no more than the super-batch's candidates are compared"),
    ),
    (
        "Phase.score_columns",
        Bound("phases[0].score_columns", || {
            refused(|s| s.phases[0].score_columns = vec![Default::default(); 65])
        }),
    ),
    (
        "ScoreColumn.name",
        Bound("phases[0].score_columns[0].name", || {
            refused(|s| s.phases[0].score_columns = vec![column(&long(NAME_BYTES_MAX))])
        }),
    ),
    ("ScoreColumn.weight", Free(NUMBER)),
    ("ScoreColumn.at_least", Free(NUMBER)),
    ("ScoreColumn.at_most", Free(NUMBER)),
    ("ScoreColumn.missing", Free(NUMBER)),
    (
        "Approximation.resolution",
        Free("below the model's image size, or the model cannot be run at it"),
    ),
    (
        "Approximation.patch",
        Free("up to the model's image size, or the model cannot be run at it"),
    ),
    (
        "Approximation.patch_dropout",
        Bound("phases[0].approximation.patch_dropout", || {
            refused(|s| {
                s.phases[0].approximation = Some(Approximation {
                    by: Some(By::PatchDropout(1e308)),
                });
                s.phases[0].multi_resolution = Some(MultiResolution::default());
            })
        }),
    ),
    (
        "Approximation.layers",
        Free("below the model's layers, or the model cannot be run at it"),
    ),
    (
        "MultiResolution.share",
        Bound("phases[0].multi_resolution.share", || {
            refused(|s| {
                let low = Approximation {
                    by: Some(By::Resolution(8)),
                };
                s.phases[0].approximation = Some(low);
                s.phases[0].multi_resolution.get_or_insert_default().share = 1.5;
            })
        }),
    ),
    ("MultiResolution.whole_step", Free(FLAG)),
    (
        "Tuning.temperature",
        Bound("phases[0].tuning.temperature", || {
            tuned(0, |t| t.temperature = Some(1e308))
        }),
    ),
    (
        "Tuning.pressure",
        Bound("phases[1].tuning.pressure", || {
            tuned(1, |t| t.pressure = Some(1e-320))
        }),
    ),
    (
        "Tuning.priority_exponent",
        Bound("phases[2].tuning.priority_exponent", || {
            tuned(2, |t| t.priority_exponent = Some(1e308))
        }),
    ),
    (
        "Tuning.weight_exponent",
        Bound("phases[2].tuning.weight_exponent", || {
            tuned(2, |t| t.weight_exponent = Some(1.5))
        }),
    ),
    (
        "Tuning.clip_score_at_least",
        Bound("phases[0].tuning.clip_score_at_least", || {
            tuned(0, |t| t.clip_score_at_least = Some(3.0))
        }),
    ),
    (
        "Tuning.neg_clip_loss_keep",
        Bound("phases[0].tuning.neg_clip_loss_keep", || {
            tuned(0, |t| t.neg_clip_loss_keep = Some(1.5))
        }),
    ),
    (
        "Tuning.duplicates_above",
        Bound("phases[0].tuning.duplicates_above", || {
            tuned(0, |t| t.duplicates_above = Some(1.5))
        }),
    ),
    (
        "Lag.exact",
        Free("arithmetic on steps; what is walked is STEPS_MAX long"),
    ),
    (
        "Lag.at_most",
        Free("arithmetic on steps; what is walked is STEPS_MAX long"),
    ),
    (
        "Fork.run_id",
        Bound("fork_of.run_id", || {
            refused(|s| s.fork_of.get_or_insert_default().run_id = long(128))
        }),
    ),
    ("Fork.step", Free(KEY)),
    // Other calls on runs.
    (
        "GetRunRequest.run_id",
        Tested("run_ids_are_safe_object_keys"),
    ),
    (
        "GetRunRequest.resume_step",
        Free("what is walked from it is STEPS_MAX long"),
    ),
    (
        "CloseRunRequest.run_id",
        Tested("run_ids_are_safe_object_keys"),
    ),
    (
        "AppendPhasesRequest.run_id",
        Tested("run_ids_are_safe_object_keys"),
    ),
    (
        "AppendPhasesRequest.phases",
        Tested("phases_without_end_are_refused_before_they_are_compared"),
    ),
    (
        "RewindRequest.run_id",
        Tested("run_ids_are_safe_object_keys"),
    ),
    (
        "RewindRequest.to_step",
        Free("at most the run's next step; the trail is cut there"),
    ),
    ("RewindRequest.mode", Free(ENUM)),
    (
        "GetReceiptRequest.run_id",
        Tested("run_ids_are_safe_object_keys"),
    ),
    ("GetReceiptRequest.step", Free(KEY)),
    (
        "GetReceiptRequest.generation",
        Free("at most the run's newest"),
    ),
    (
        "GetReceiptRequest.row_offset",
        Free("at most the receipt's rows"),
    ),
    (
        "GetReceiptRequest.max_rows",
        Free("at most what a page holds"),
    ),
    // Selecting.
    (
        "SelectBatchRequest.run_id",
        Tested("run_ids_are_safe_object_keys"),
    ),
    (
        "SelectBatchRequest.generation",
        Free("the run's newest, or the call is refused"),
    ),
    (
        "SelectBatchRequest.step",
        Free("at most max_ahead beyond what was consumed"),
    ),
    ("SelectBatchRequest.rank", Free("below world_size")),
    (
        "SelectBatchRequest.world_size",
        Free("divides sub_batch_size"),
    ),
    (
        "SelectBatchRequest.incarnation",
        Bound("incarnation", || check_incarnation(&long(LABEL_BYTES_MAX))),
    ),
    ("SelectBatchRequest.intent", Free(ENUM)),
    (
        "SelectBatchRequest.consumed_through",
        Free("at most the newest committed step"),
    ),
    ("SelectBatchRequest.delivery", Free(ENUM)),
    (
        "SelectBatchRequest.resume_offset",
        Free("at most the stream's bytes"),
    ),
    ("SelectBatchRequest.pushing_through", Free(KEY)),
    (
        "SelectBatchRequest.held_steps",
        Free("subtracted from a step, not below 0"),
    ),
    // Weights.
    ("PushWeightsRequest.start", How::Message),
    ("PushWeightsRequest.part", How::Message),
    (
        "PushWeightsRequest.data",
        Free("no more than its part's extent, which was checked"),
    ),
    ("PushStart.run_id", Tested("run_ids_are_safe_object_keys")),
    (
        "PushStart.generation",
        Free("the run's newest, or the push is refused"),
    ),
    (
        "PushStart.step",
        Tested("a_push_is_of_a_step_that_can_have_been_trained"),
    ),
    (
        "PushStart.push_id",
        Tested("ids_and_parts_of_a_push_are_bounded_before_they_are_kept"),
    ),
    (
        "PushStart.expected_parts",
        Tested("ids_and_parts_of_a_push_are_bounded_before_they_are_kept"),
    ),
    ("PushStart.base_version", Free(KEY)),
    ("PushStart.rank", Free(KEY)),
    ("PushStart.sender", Free(KEY)),
    ("PushStart.attempt", Free(KEY)),
    (
        "PushStart.incarnation",
        Bound("incarnation", || check_incarnation(&long(LABEL_BYTES_MAX))),
    ),
    (
        "PushStart.snapshot_uri",
        Bound("snapshot_uri", || {
            by_uri(|start| start.snapshot_uri = long(URI_BYTES_MAX))
        }),
    ),
    (
        "PushStart.snapshot_blake3",
        Bound("snapshot_blake3", || {
            by_uri(|start| start.snapshot_blake3 = vec![0; 33].into())
        }),
    ),
    (
        "ReportLossesRequest.run_id",
        Tested("run_ids_are_safe_object_keys"),
    ),
    ("ReportLossesRequest.generation", Free(KEY)),
    ("ReportLossesRequest.step", Free(KEY)),
    (
        "ReportLossesRequest.ids",
        Tested("a_report_has_one_finite_loss_of_each_example"),
    ),
    (
        "ReportLossesRequest.losses",
        Tested("a_report_has_one_finite_loss_of_each_example"),
    ),
    (
        "ListWeightsRequest.run_id",
        Tested("run_ids_are_safe_object_keys"),
    ),
    ("ListWeightsRequest.newest", Free("cut to VERSIONS_MAX")),
    (
        "GetWeightsDigestsRequest.run_id",
        Tested("run_ids_are_safe_object_keys"),
    ),
    ("GetWeightsDigestsRequest.version", Free(KEY)),
    (
        "GetWeightsDigestsRequest.tensor_offset",
        Free("beyond the tensors there are none; cut to them"),
    ),
    (
        "RollBackWeightsRequest.run_id",
        Tested("run_ids_are_safe_object_keys"),
    ),
    ("RollBackWeightsRequest.version", Free(KEY)),
    ("PartHeader.name", Tested("parts_of_a_push_are_bounded")),
    ("PartHeader.dtype", Free(ENUM)),
    (
        "PartHeader.global_shape",
        Free("the learner's own, or the part is refused"),
    ),
    (
        "PartHeader.start",
        Free("as many dimensions as the learner's tensor, and within it"),
    ),
    (
        "PartHeader.extent",
        Free("as start; its bytes count against push_bytes_max"),
    ),
    ("PartHeader.xxh3", Free("compared")),
    (
        "AnnouncePushRequest.run_id",
        Tested("run_ids_are_safe_object_keys"),
    ),
    (
        "AnnouncePushRequest.generation",
        Free("the run's newest, or the call is refused"),
    ),
    (
        "AnnouncePushRequest.step",
        Tested("a_push_is_of_a_step_that_can_have_been_trained"),
    ),
    (
        "AnnouncePushRequest.rank",
        Tested("announcements_are_bounded_and_the_oldest_go_first"),
    ),
    (
        "AnnouncePushRequest.incarnation",
        Bound("incarnation", || check_incarnation(&long(LABEL_BYTES_MAX))),
    ),
    ("AnnouncePushRequest.withdrawn", Free(FLAG)),
    // Workers that register.
    (
        "RegisterRequest.address",
        Bound("address", || {
            registered(|r| r.address = long(URI_BYTES_MAX))
        }),
    ),
    (
        "RegisterRequest.incarnation",
        Bound("incarnation", || {
            registered(|r| r.incarnation = long(LABEL_BYTES_MAX))
        }),
    ),
    (
        "RegisterRequest.device",
        Bound("device", || {
            registered(|r| r.device = long(LABEL_BYTES_MAX))
        }),
    ),
    ("RegisterRequest.leaving", Free(FLAG)),
    (
        "RegisterRequest.build",
        Bound("build", || registered(|r| r.build = long(LABEL_BYTES_MAX))),
    ),
    (
        "RegisterRequest.state_id",
        Bound("state_id", || {
            registered(|r| r.state_id = long(LABEL_BYTES_MAX))
        }),
    ),
    (
        "RegisterRequest.state_uri",
        Bound("state_uri", || {
            registered(|r| r.state_uri = long(URI_BYTES_MAX))
        }),
    ),
    (
        "RegisterRequest.token",
        Bound("token", || registered(|r| r.token = long(TOKEN_BYTES_MAX))),
    ),
    // What a worker is asked.
    ("ModelRef.model_uri", Tested("what_a_call_names_is_bounded")),
    (
        "ModelRef.snapshot_uri",
        Tested("what_a_call_names_is_bounded"),
    ),
    (
        "ModelRef.snapshot_digest",
        Tested("what_a_call_names_is_bounded"),
    ),
    ("ModelRef.random_seed", Free(KEY)),
    ("ModelRef.compute_dtype", Free(ENUM)),
    ("PrepareModelRequest.model", How::Message),
    ("PrepareModelRequest.canary", Free(FLAG)),
    (
        "BlockRows.source",
        Free("one of the manifest, or the call is refused"),
    ),
    (
        "BlockRows.shard",
        Free("one of the manifest, or the call is refused"),
    ),
    (
        "BlockRows.block",
        Free("one of the manifest, or the call is refused"),
    ),
    ("BlockRows.rows", Tested("what_a_call_names_is_bounded")),
    ("ScoreRequest.begin", How::Message),
    ("ScoreRequest.learner", How::Message),
    ("ScoreRequest.chosen", How::Message),
    ("ScoreBegin.run_id", Free("not read; a message bounds it")),
    ("ScoreBegin.generation", Free(KEY)),
    ("ScoreBegin.step", Free(KEY)),
    (
        "ScoreBegin.dataset_manifest",
        Tested("what_a_call_names_is_bounded"),
    ),
    ("ScoreBegin.blocks", Tested("what_a_call_names_is_bounded")),
    (
        "ScoreBegin.micro_batch_rows",
        Tested("what_a_call_names_is_bounded"),
    ),
    ("ScoreBegin.reference", How::Message),
    ("ScoreBegin.learner_model", How::Message),
    ("ScoreBegin.embedding_dtype", Free(ENUM)),
    ("ScoreBegin.columns", Tested("what_a_call_names_is_bounded")),
    ("ScoreBegin.check_only", Free(FLAG)),
    (
        "ScoreBegin.reference_from",
        Free("at most the slice's candidates, where a block begins"),
    ),
    (
        "ScoreBegin.reference_more",
        Tested("what_a_call_names_is_bounded"),
    ),
    ("ScoreBegin.approximation", How::Message),
    ("ScoreBegin.reference_sparse", Free(FLAG)),
    ("LearnerGo.learner", How::Message),
    (
        "ChosenRows.candidates",
        Free("at most as many as the slice has, each one of them"),
    ),
    ("ChosenRows.form", Free(ENUM)),
    ("FetchRowsRequest.form", Free(ENUM)),
    (
        "FetchRowsRequest.run_id",
        Tested("what_a_call_for_rows_names_is_bounded"),
    ),
    ("FetchRowsRequest.generation", Free(KEY)),
    ("FetchRowsRequest.step", Free(KEY)),
    ("ScoreResponse.kept", How::Message),
    ("FetchRowsResponse.kept", How::Message),
    ("KeptRows.id", Free(KEY)),
    (
        "KeptRows.content_hashes",
        Tested("an_answer_of_another_size_is_unsound"),
    ),
    (
        "KeptRows.bytes",
        Tested("rows_beyond_the_bound_are_not_kept"),
    ),
    ("FetchTicketRequest.ticket", Free(BYTES)),
    (
        "FetchTicketRequest.resume_offset",
        Free("compared with the stream's bytes"),
    ),
    ("TicketClaims.run_id", Free(SIGNED)),
    ("TicketClaims.generation", Free(SIGNED)),
    ("TicketClaims.step", Free(SIGNED)),
    ("TicketClaims.rank", Free(SIGNED)),
    ("TicketClaims.world_size", Free(SIGNED)),
    ("TicketClaims.kept", Free(SIGNED)),
    ("TicketClaims.rows", Free(SIGNED)),
    ("TicketClaims.expires_unix_ms", Free(SIGNED)),
    (
        "RegisterRequest.ticket_key",
        Bound("ticket_key", || {
            registered(|r| r.ticket_key = vec![0; 33].into())
        }),
    ),
    (
        "FetchRowsRequest.dataset_manifest",
        Tested("what_a_call_for_rows_names_is_bounded"),
    ),
    (
        "FetchRowsRequest.blocks",
        Tested("what_a_call_for_rows_names_is_bounded"),
    ),
    (
        "FetchRowsRequest.columns",
        Tested("what_a_call_for_rows_names_is_bounded"),
    ),
    (
        "RegisterResponse.lease_seconds",
        Tested("a_lease_of_any_length_is_renewed"),
    ),
    ("SelectRequest.begin", How::Message),
    ("SelectRequest.embedding", How::Message),
    ("SelectRequest.candidates", How::Message),
    (
        "CandidatesPart.positions",
        Tested("candidates_without_end_are_refused"),
    ),
    (
        "CandidatesPart.holes",
        Tested("candidates_without_end_are_refused"),
    ),
    (
        "CandidatesPart.terms",
        Tested("candidates_without_end_are_refused"),
    ),
    ("SelectBegin.policy", Free(ENUM)),
    ("SelectBegin.criterion", Free(ENUM)),
    ("SelectBegin.loss", Free(ENUM)),
    (
        "SelectBegin.sub_batch_size",
        Free("at most the candidates, or the selection is refused"),
    ),
    (
        "SelectBegin.n_chunks",
        Free("more chunks than rows are as many as rows"),
    ),
    ("SelectBegin.gain", Free(NUMBER)),
    ("SelectBegin.seed", Free(KEY)),
    ("SelectBegin.generation", Free(KEY)),
    ("SelectBegin.step", Free(KEY)),
    (
        "SelectBegin.positions",
        Tested("candidates_without_end_are_refused"),
    ),
    (
        "SelectBegin.holes",
        Tested("candidates_without_end_are_refused"),
    ),
    ("SelectBegin.learner_scale", Free(NUMBER)),
    ("SelectBegin.learner_bias", Free(NUMBER)),
    ("SelectBegin.reference_scale", Free(NUMBER)),
    ("SelectBegin.reference_bias", Free(NUMBER)),
    ("SelectBegin.embedding_dtype", Free(ENUM)),
    ("SelectBegin.tuning", How::Message),
    (
        "SelectBegin.terms",
        Tested("candidates_without_end_are_refused"),
    ),
    // What a worker answers.
    (
        "PrepareModelResponse.digest",
        Bound("digest", || modelled(|m| m.digest = long(LABEL_BYTES_MAX))),
    ),
    (
        "PrepareModelResponse.model_type",
        Bound("model_type", || {
            modelled(|m| m.model_type = long(LABEL_BYTES_MAX))
        }),
    ),
    (
        "PrepareModelResponse.embedding_dim",
        Bound("embedding_dim", || {
            modelled(|m| m.embedding_dim = EMBEDDING_DIM_MAX + 1)
        }),
    ),
    ("PrepareModelResponse.image_size", Free("not read")),
    ("PrepareModelResponse.text_length", Free("not read")),
    (
        "PrepareModelResponse.logit_scale",
        Bound("logit_scale", || {
            modelled(|m| m.logit_scale = f64::INFINITY)
        }),
    ),
    (
        "PrepareModelResponse.logit_bias",
        Bound("logit_bias", || modelled(|m| m.logit_bias = Some(f64::NAN))),
    ),
    (
        "PrepareModelResponse.image_flops",
        Bound("image_flops", || modelled(|m| m.image_flops = f64::NAN)),
    ),
    (
        "PrepareModelResponse.text_flops",
        Bound("text_flops", || modelled(|m| m.text_flops = -1.0)),
    ),
    (
        "PrepareModelResponse.tensors",
        Bound("tensors", || {
            modelled(|m| m.tensors = vec![TensorInfo::default(); TENSORS_MAX + 1])
        }),
    ),
    (
        "PrepareModelResponse.device",
        Bound("device", || modelled(|m| m.device = long(LABEL_BYTES_MAX))),
    ),
    (
        "PrepareModelResponse.weights_digest",
        Bound("weights_digest", || {
            modelled(|m| m.weights_digest = long(LABEL_BYTES_MAX))
        }),
    ),
    ("PrepareModelResponse.compute_dtype", Free(ENUM)),
    (
        "PrepareModelResponse.files",
        Bound("files", || {
            modelled(|m| {
                m.files = (0..=FILES_MAX)
                    .map(|n| (n.to_string(), String::new()))
                    .collect()
            })
        }),
    ),
    ("PrepareModelResponse.image_tower", How::Message),
    (
        "ImageTower.image_size",
        Free("compared with an approximation"),
    ),
    (
        "ImageTower.patch_size",
        Free("a divisor; 0 is an exported module"),
    ),
    ("ImageTower.layers", Free("compared with an approximation")),
    (
        "ImageTower.max_patches",
        Free("other than 0, no approximation fits"),
    ),
    (
        "ImageTower.constant",
        Bound("image_tower.constant", || {
            towered(|t| t.constant = f64::NAN)
        }),
    ),
    (
        "ImageTower.per_patch",
        Bound("image_tower.per_patch", || {
            towered(|t| t.per_patch = f64::INFINITY)
        }),
    ),
    (
        "ImageTower.layer_constant",
        Bound("image_tower.layer_constant", || {
            towered(|t| t.layer_constant = f64::NAN)
        }),
    ),
    (
        "ImageTower.layer_per_patch",
        Bound("image_tower.layer_per_patch", || {
            towered(|t| t.layer_per_patch = f64::NAN)
        }),
    ),
    (
        "ImageTower.layer_per_patch_pair",
        Bound("image_tower.layer_per_patch_pair", || {
            towered(|t| t.layer_per_patch_pair = f64::NAN)
        }),
    ),
    (
        "ImageTower.per_pixel",
        Bound("image_tower.per_pixel", || {
            towered(|t| t.per_pixel = f64::NAN)
        }),
    ),
    (
        "ImageTower.per_patch_pair",
        Bound("image_tower.per_patch_pair", || {
            towered(|t| t.per_patch_pair = -1.0)
        }),
    ),
    (
        "TensorInfo.name",
        Bound("impossible name", || {
            modelled(|m| m.tensors[0].name = long(TENSOR_NAME_BYTES_MAX))
        }),
    ),
    (
        "TensorInfo.shape",
        Bound("shape", || {
            modelled(|m| m.tensors[0].shape = vec![1 << 30; 2])
        }),
    ),
    ("TensorInfo.optional", Free(FLAG)),
    ("ScoreResponse.holes", How::Message),
    ("ScoreResponse.embedding", How::Message),
    ("ScoreResponse.done", How::Message),
    (
        "ScoreResponse.arrow_ipc",
        Tested("rows_of_a_slice_are_bounded"),
    ),
    ("ScoreResponse.rows_done", How::Message),
    (
        "Holes.holes",
        Bound("a hole at candidate 4", || {
            checked_holes(
                vec![Hole {
                    candidate: 4,
                    ..Default::default()
                }],
                4,
            )
            .map(drop)
        }),
    ),
    ("Holes.fetch_seconds", Free("not finite or below 0 is 0")),
    ("Holes.decode_seconds", Free("not finite or below 0 is 0")),
    (
        "Hole.candidate",
        Tested("a_hole_lies_in_its_slice_and_is_told_once"),
    ),
    ("Hole.reason", Free(ENUM)),
    (
        "Hole.detail",
        Tested("a_hole_lies_in_its_slice_and_is_told_once"),
    ),
    ("EmbeddingPart.tower", Free(ENUM)),
    (
        "EmbeddingPart.first",
        Tested("a_size_is_checked_before_it_is_used"),
    ),
    (
        "EmbeddingPart.rows",
        Tested("a_size_is_checked_before_it_is_used"),
    ),
    (
        "EmbeddingPart.dim",
        Tested("a_size_is_checked_before_it_is_used"),
    ),
    ("EmbeddingPart.image", Free(BYTES)),
    ("EmbeddingPart.text", Free(BYTES)),
    ("EmbedDone.tower", Free(ENUM)),
    (
        "EmbedDone.seconds",
        Bound("seconds", || done(|d| d.seconds = f64::NAN)),
    ),
    (
        "EmbedDone.flops",
        Bound("flops", || done(|d| d.flops = f64::INFINITY)),
    ),
    (
        "EmbedDone.logit_scale",
        Bound("logit_scale", || done(|d| d.logit_scale = f64::NAN)),
    ),
    (
        "EmbedDone.logit_bias",
        Bound("logit_bias", || done(|d| d.logit_bias = Some(f64::NAN))),
    ),
    (
        "EmbedDone.model_digest",
        Bound("model_digest", || {
            done(|d| d.model_digest = long(LABEL_BYTES_MAX))
        }),
    ),
    ("EmbedDone.rows_cached", Free("counted in a metric")),
    (
        "EmbedDone.not_finite",
        Bound("candidate 4", || done(|d| d.not_finite = vec![4])),
    ),
    (
        "EmbedDone.device",
        Bound("device", || done(|d| d.device = long(LABEL_BYTES_MAX))),
    ),
    ("EmbedDone.compute_dtype", Free(ENUM)),
    (
        "EmbedDone.files",
        Bound("files", || {
            done(|d| drop(d.files.insert(long(LABEL_BYTES_MAX), String::new())))
        }),
    ),
    (
        "EmbedDone.text_flops",
        Bound("text_flops", || done(|d| d.text_flops = f64::NAN)),
    ),
    (
        "RowsDone.rows",
        Free("as many as were wanted, or the worker is not believed"),
    ),
    ("RowsDone.rows_read_again", Free("counted in a metric")),
    (
        "FetchRowsResponse.arrow_ipc",
        Tested("rows_of_a_slice_are_bounded"),
    ),
    ("FetchRowsResponse.done", How::Message),
    (
        "SelectResponse.indices",
        Bound("3 candidates", || selected(|s| s.indices = vec![0, 1, 2])),
    ),
    (
        "SelectResponse.chunks",
        Bound("chunks", || selected(|s| s.chunks = vec![4])),
    ),
    (
        "SelectResponse.scores",
        Bound("scores", || selected(|s| s.scores = vec![0.0; 3])),
    ),
    (
        "SelectResponse.weights",
        Bound("scores", || selected(|s| s.weights = vec![1.0; 3])),
    ),
    (
        "SelectResponse.batch_score",
        Bound("batch_score", || selected(|s| s.batch_score = f64::NAN)),
    ),
    (
        "SelectResponse.mean_score_chosen",
        Bound("mean_score_chosen", || {
            selected(|s| s.mean_score_chosen = f64::NAN)
        }),
    ),
    (
        "SelectResponse.mean_score_candidates",
        Bound("mean_score_candidates", || {
            selected(|s| s.mean_score_candidates = f64::NAN)
        }),
    ),
    (
        "SelectResponse.seconds",
        Bound("seconds", || selected(|s| s.seconds = -1.0)),
    ),
    (
        "SelectResponse.flops",
        Bound("flops", || selected(|s| s.flops = f64::NAN)),
    ),
    (
        "SelectResponse.device",
        Bound("device", || selected(|s| s.device = long(LABEL_BYTES_MAX))),
    ),
    ("SelectResponse.threads", Free("written down")),
    ("SelectResponse.left_out", How::Message),
];

#[derive(Clone, PartialEq, Message)]
struct Set {
    #[prost(message, repeated, tag = "1")]
    file: Vec<File>,
}
#[derive(Clone, PartialEq, Message)]
struct File {
    #[prost(string, tag = "2")]
    package: String,
    #[prost(message, repeated, tag = "4")]
    messages: Vec<Described>,
}
#[derive(Clone, PartialEq, Message)]
struct Described {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, repeated, tag = "2")]
    fields: Vec<Field>,
}
#[derive(Clone, PartialEq, Message)]
struct Field {
    #[prost(string, tag = "1")]
    name: String,
}

/// `Message.field` of all that the descriptors of the protocol hold, but for what is sent only.
fn described() -> BTreeSet<String> {
    let set = Set::decode(FILE_DESCRIPTOR_SET).unwrap();
    let ours = set
        .file
        .into_iter()
        .filter(|file| file.package == "superbatch.v1");
    let messages = ours.flat_map(|file| file.messages);
    let read = messages.filter(|message| !SENT.contains(&message.name.as_str()));
    read.flat_map(|message| {
        let fields = message.fields.into_iter();
        fields
            .map(move |field| format!("{}.{}", message.name, field.name))
            .collect::<Vec<_>>()
    })
    .collect()
}

#[test]
fn every_field_off_the_wire_is_listed() {
    let listed: BTreeSet<String> = FIELDS
        .iter()
        .map(|(field, _)| (*field).to_owned())
        .collect();
    assert_eq!(listed.len(), FIELDS.len(), "a field is listed twice");
    let described = described();
    let missing: Vec<_> = described.difference(&listed).collect();
    let unknown: Vec<_> = listed.difference(&described).collect();
    assert!(
        missing.is_empty(),
        "give each its bound, or say what it sizes: {missing:?}"
    );
    assert!(unknown.is_empty(), "no longer in the protocol: {unknown:?}");
}

#[tokio::test]
async fn what_is_beyond_a_bound_is_refused_by_name() {
    for (field, how) in FIELDS {
        match how {
            Bound(name, beyond) => {
                let error = beyond().expect_err(field);
                let told = error.value("field").map(str::to_owned);
                let told = told.unwrap_or_else(|| error.to_string());
                assert!(told.contains(name), "{field}: {told}");
            }
            Free(why) => assert!(!why.is_empty(), "{field}"),
            Tested(_) | How::Message => {}
        }
    }
}

/// The text of all tests of the workspace that the table may name.
fn tests_below(folder: &Path) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            text.push_str(&tests_below(&path));
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            text.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
    text
}

#[test]
fn the_tests_that_the_table_names_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let folders = ["server/src", "proto/src", "tests/tests"];
    let text: String = folders
        .iter()
        .map(|folder| tests_below(&root.join(folder)))
        .collect();
    for (field, how) in FIELDS {
        if let Tested(name) = how {
            assert!(
                text.contains(&format!("fn {name}()")),
                "{field}: there is no test {name}"
            );
        }
    }
}

#[test]
fn no_more_workers_register_than_one_coordinator_has() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let _entered = runtime.enter();
    let pool = Pool::new(Duration::from_secs(9), Duration::ZERO, Home::default());
    let now = Instant::now();
    let register = |n: usize| {
        let address = format!("http://127.0.0.1:{n}");
        pool.register(
            &RegisterRequest {
                address,
                ..Default::default()
            },
            now,
        )
    };
    (1..=WORKERS_MAX).for_each(|n| register(n).unwrap());
    assert_eq!(
        register(WORKERS_MAX + 1).unwrap_err().reason(),
        Reason::Overloaded
    );
    register(7).unwrap();
}
