//! A whole service in one process: the same choices whatever the workers, and scripted faults of
//! its storage.
#![allow(clippy::unwrap_used)]
use arrow::{
    array::{ArrayRef, AsArray, BinaryArray, StringArray},
    record_batch::RecordBatch,
};
use parquet::arrow::ArrowWriter;
use std::{path::Path, sync::Arc, time::Duration};
use superbatch_client::{
    Client, ConnectConfig, Part, Retry, Run,
    v1::{
        Criterion, Fallback, Intent, Lag, Phase, Policy, Reason, RewindMode, RunInfo, RunSpec,
        TensorDtype, lag,
    },
};
use superbatch_server::{
    app::Work,
    config::Config,
    coordinator::facts::{chain::Rewound, run::create_generation},
    storage::{Budget, Location, StorageConfig, Stores},
};
use superbatch_tests::{
    cluster::Cluster,
    faults::{Fault, How, Operation, Script},
};
use tokio::sync::Notify;

/// Ids of the rows that a rank gets.
async fn ids(run: &Run, step: u64) -> Vec<String> {
    let batch = run.select(step, 0, 1, Intent::Need).await.unwrap();
    let column = batch.record_batch.column_by_name("_superbatch_id").unwrap();
    column
        .as_string::<i32>()
        .iter()
        .flatten()
        .map(str::to_owned)
        .collect()
}

/// A run that needs no pushes.
fn easy(cluster: &Cluster) -> RunSpec {
    let mut spec = cluster.spec();
    spec.phases[0].criterion = Criterion::Easy.into();
    spec
}

fn uniform(cluster: &Cluster) -> RunSpec {
    let mut spec = cluster.spec();
    spec.phases[0].policy = Policy::Uniform.into();
    spec
}

fn once(operation: Operation, path: &'static str, how: How) -> Script {
    Script::new([Fault {
        operation,
        path,
        how,
        times: 1,
    }])
}

/// Makes another coordinator the owner of a run. Returns where the run's state is.
async fn taken_over(cluster: &Cluster, run_id: &str) -> Location {
    let state = Stores::new(StorageConfig::default())
        .open(&cluster.uri(&format!("state/runs/{run_id}")))
        .unwrap();
    let owner = r#"{"address": "http://127.0.0.1:1", "instance": "another", "nonce": "n"}"#;
    state.create("owner/2.json", owner.into()).await.unwrap();
    state
}

/// A client that asks once.
fn impatient() -> ConnectConfig {
    ConnectConfig {
        retry: Retry {
            attempts_max: 1,
            ..Retry::default()
        },
        ..ConnectConfig::default()
    }
}

/// What a run of all its data chose, and what that cost: operations of the reference and the
/// learner.
async fn whole_run(
    workers: usize,
    spec: impl Fn(&Cluster) -> RunSpec,
) -> (Vec<Vec<String>>, [f64; 3]) {
    let cluster = Cluster::start(workers, Script::default()).await;
    let run = cluster
        .open_run(
            "same",
            RunSpec {
                epochs: 1,
                ..spec(&cluster)
            },
        )
        .await
        .unwrap();
    let mut chosen = Vec::new();
    for step in 0..run.opened().steps_total {
        chosen.push(ids(&run, step).await);
    }
    let spent = run.get_run().await.unwrap().accounts.unwrap();
    cluster.stop().await;
    (
        chosen,
        [
            spent.reference_flops,
            spent.learner_flops,
            spent.discarded_flops,
        ],
    )
}

/// One worker and three choose the same at the same cost, in steps of `size`: candidates, chosen,
/// rows of a micro-batch, blocks that are shuffled together.
async fn same_on_any_workers(size: (u32, u32, u32, u32)) {
    let with_size = |mut spec: RunSpec| {
        (
            spec.phases[0].super_batch_size,
            spec.phases[0].sub_batch_size,
            spec.micro_batch_rows,
            spec.window_blocks,
        ) = size;
        spec
    };
    let lag = Some(Lag {
        bound: Some(lag::Bound::AtMost(1000)),
    });
    let scored = |cluster: &Cluster| {
        with_size(RunSpec {
            lag,
            ..cluster.spec()
        })
    };
    let easy = |cluster: &Cluster| with_size(easy(cluster));
    let uniform = |cluster: &Cluster| with_size(uniform(cluster));
    let expected = [
        whole_run(0, easy).await,
        whole_run(0, scored).await,
        whole_run(0, uniform).await,
    ];
    assert!(expected.iter().all(|(chosen, _)| chosen.len() >= 3));
    for workers in [1, 3] {
        assert_eq!(whole_run(workers, easy).await, expected[0]);
        assert_eq!(whole_run(workers, scored).await, expected[1]);
        assert_eq!(whole_run(workers, uniform).await, expected[2]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_that_are_cut_cost_the_same_on_one_worker_and_three() {
    // 24 candidates a slice, 16 rows a block.
    same_on_any_workers((72, 16, 8, 16)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slices_inside_a_block_cost_the_same_on_one_worker_and_three() {
    // 4 candidates a slice, of one or two blocks of 16 rows: some slices neither begin nor end a
    // block.
    same_on_any_workers((12, 4, 4, 1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_alone_cannot_read_costs_no_step() {
    let (expected, _) = whole_run(1, easy).await;
    let mut cluster = Cluster::start(1, Script::default()).await;
    let fault = Fault {
        operation: Operation::Read,
        path: "data/train",
        how: How::Fails,
        times: usize::MAX,
    };
    let script = Script::new([fault]);
    cluster.add_worker(&script).await;
    let run = cluster
        .open_run(
            "unable",
            RunSpec {
                epochs: 1,
                ..easy(&cluster)
            },
        )
        .await
        .unwrap();
    for (step, chosen) in expected.iter().enumerate() {
        assert_eq!(&ids(&run, step as u64).await, chosen);
    }
    assert!(
        script.left()[0].times < usize::MAX,
        "it was asked, and could not read"
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_of_another_state_is_sent_away_and_ends() {
    let cluster = Cluster::start(1, Script::default()).await;
    let config = Config {
        state: cluster.uri("elsewhere"),
        ..cluster.config()
    };
    let worker = Work::build(config).await.unwrap();
    let error = worker.run(std::future::pending()).await.unwrap_err();
    let told = [
        error.value("field"),
        error.value("theirs"),
        error.value("ours"),
    ]
    .map(Option::unwrap_or_default);
    assert_eq!(
        told,
        ["state", &cluster.uri("elsewhere"), &cluster.uri("state")]
    );
    let run = cluster
        .open_run("undisturbed", easy(&cluster))
        .await
        .unwrap();
    assert_eq!(ids(&run, 0).await.len(), 16);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receipt_whose_answer_was_lost_is_still_its_writers() {
    let cluster =
        Cluster::start(0, once(Operation::Create, "receipts/0/1/", How::AnswerLost)).await;
    let run = cluster
        .open_run("lost-answer", easy(&cluster))
        .await
        .unwrap();
    let served = [ids(&run, 0).await, ids(&run, 1).await, ids(&run, 2).await];
    let receipt = run.receipt(1, None).await.unwrap();
    let mut chosen: Vec<_> = receipt.chosen.iter().map(|row| row.id.clone()).collect();
    let mut sent = served[1].clone();
    chosen.sort();
    sent.sort();
    assert_eq!(chosen, sent);
    let accounts = run.get_run().await.unwrap().accounts.unwrap();
    assert_eq!(
        accounts.examples_selected % 16,
        0,
        "no step is counted twice: {accounts:?}"
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receipt_that_could_not_be_written_is_written_again() {
    let script = Script::new([Fault {
        operation: Operation::Create,
        path: "receipts/",
        how: How::Fails,
        times: 3,
    }]);
    let cluster = Cluster::start(0, script).await;
    let run = cluster
        .open_run("not-written", easy(&cluster))
        .await
        .unwrap();
    let first = ids(&run, 0).await;
    assert_eq!(first.len(), 16);
    assert_eq!(ids(&run, 0).await, first);
    cluster.stop().await;
}

/// However many layers try again, a commit asks the store as often as one call may.
#[tokio::test(flavor = "multi_thread")]
async fn attempts_of_all_layers_come_from_one_budget() {
    let script = Script::new([Fault {
        operation: Operation::Create,
        path: "facts/k",
        how: How::Fails,
        times: 1000,
    }]);
    let stores = Stores::wrapped(StorageConfig::default(), script.wrap());
    let state = stores.open("memory:///state").unwrap();
    let (long, short) = (Duration::from_secs(300), Duration::from_millis(1));
    let mut asked = 0;
    for (whole, attempts) in [(long, Budget::ATTEMPTS_MAX), (Duration::ZERO, 1)] {
        let budget = Budget::of(whole, short);
        let created = state.create_within("facts/k", "x".into(), budget).await;
        assert_eq!(created.unwrap_err().reason(), Reason::StorageUnreachable);
        asked += attempts;
        assert_eq!(1000 - script.left()[0].times, asked);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_is_tried_again_holds_no_other_up() {
    let script = Script::new([Fault {
        operation: Operation::Create,
        path: "receipts/0/0/",
        how: How::Fails,
        times: 4,
    }]);
    let cluster = Cluster::start(0, script).await;
    let run = cluster
        .open_run("patient", uniform(&cluster))
        .await
        .unwrap();
    let mut first = std::pin::pin!(ids(&run, 0));
    tokio::select! {
        biased;
        _ = &mut first => panic!("step 0 cannot be committed yet"),
        next = ids(&run, 1) => assert_eq!(next.len(), 16),
    }
    assert_eq!(first.await.len(), 16);
    assert!(cluster.is_played_out());
    cluster.stop().await;
}

/// Step 0 is written, but neither the answer nor the read after it arrives, so its commit pauses;
/// meanwhile step 1 commits. No cost is lost from the totals, and what is told of a step is what
/// its receipt holds.
#[tokio::test(flavor = "multi_thread")]
async fn totals_hold_a_receipt_whose_writing_was_in_doubt() {
    let go = Arc::new(Notify::new());
    let fault = |operation, path, how| Fault {
        operation,
        path,
        how,
        times: 1,
    };
    let script = Script::new([
        fault(Operation::Create, "receipts/0/0/", How::AnswerLost),
        // The look for an earlier decision, and then the one after the create.
        fault(Operation::Read, "receipts/0/0/", How::Passes),
        fault(Operation::Read, "receipts/0/0/", How::Fails),
        fault(Operation::Read, "receipts/0/1/", How::Waits(go.clone())),
    ]);
    let cluster = Cluster::start(0, script.clone()).await;
    let spec = RunSpec {
        max_ahead: 2,
        ..uniform(&cluster)
    };
    let run = cluster.open_run("in-doubt", spec).await.unwrap();
    let first = tokio::spawn({
        let run = run.clone();
        async move { ids(&run, 0).await }
    });
    while !script.left().is_empty() {
        tokio::task::yield_now().await;
    }
    go.notify_one();
    assert_eq!(ids(&run, 1).await.len(), 16);
    assert_eq!(first.await.unwrap().len(), 16);
    let mut totals = Vec::new();
    for step in [0, 1] {
        let receipt = run.receipt(step, None).await.unwrap();
        let summary = receipt.summary.unwrap();
        totals.push(summary.run_totals.unwrap().examples_selected);
    }
    totals.sort_unstable();
    assert_eq!(totals, [16, 32], "each holds those before it");
    let accounts = run.get_run().await.unwrap().accounts.unwrap();
    assert_eq!(accounts.examples_selected % 16, 0);
    assert!(accounts.examples_selected >= 32, "{accounts:?}");
    cluster.stop().await;
}

/// Another coordinator takes the run over and rewinds it. The one before has the run in memory, and
/// answers for the receipts from the state.
#[tokio::test(flavor = "multi_thread")]
async fn a_former_owner_answers_with_receipts_that_are_in_force() {
    let cluster = Cluster::start(0, Script::default()).await;
    let run = cluster
        .open_run("rewound", uniform(&cluster))
        .await
        .unwrap();
    ids(&run, 0).await;
    let state = taken_over(&cluster, "rewound").await;
    let rewound = Rewound {
        generation: 1,
        to_step: 0,
        replay: false,
    };
    create_generation(&state, &rewound).await.unwrap();
    let newest = run.receipt(0, None).await.unwrap_err();
    assert_eq!(newest.reason(), Some(Reason::StepNotCommitted), "{newest}");
    assert_eq!(run.receipt(0, Some(0)).await.unwrap().chosen.len(), 16);
    cluster.stop().await;
}

/// Another coordinator takes the run over. The one before has a batch ready, and serves it only for
/// as long as its last look at the owner holds.
#[tokio::test(flavor = "multi_thread")]
async fn a_former_owner_does_not_serve_from_memory_for_ever() {
    let cluster = Cluster::start(0, Script::default()).await;
    let run = cluster.open_run("taken", uniform(&cluster)).await.unwrap();
    ids(&run, 0).await;
    taken_over(&cluster, "taken").await;
    let refused = async {
        loop {
            if let Err(refused) = run.select(0, 0, 1, Intent::Need).await {
                return refused;
            }
        }
    };
    let refused = tokio::time::timeout(Duration::from_secs(60), refused).await;
    let refused = refused.expect("it looks again");
    assert_eq!(refused.reason(), Some(Reason::NotOwner), "{refused}");
    cluster.stop().await;
}

/// A process sleeps while it creates a receipt. When it wakes, another coordinator has the run, and
/// the step's receipt may lie in a pack, without an object: the create goes well, and decides
/// nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_was_overtaken_is_not_served() {
    let go = Arc::new(Notify::new());
    let script = once(Operation::Create, "receipts/0/0/", How::Waits(go.clone()));
    let cluster = Cluster::start(0, script).await;
    let run = cluster
        .open_run("overtaken", uniform(&cluster))
        .await
        .unwrap();
    let waits = tokio::spawn({
        let run = run.clone();
        async move { run.select(0, 0, 1, Intent::Need).await.map(drop) }
    });
    while !cluster.is_played_out() {
        tokio::task::yield_now().await;
    }
    let state = taken_over(&cluster, "overtaken").await;
    go.notify_one();
    let refused = waits.await.unwrap().unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::NotOwner), "{refused}");
    let created = state.find("receipts/0/0/0.parquet").await.unwrap();
    assert!(created.is_some(), "it was created");
    cluster.stop().await;
}

/// The worker that checks a push is held up; the run commits on, and deletes what it retired.
#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_is_being_verified_holds_no_commit_up() {
    let go = Arc::new(Notify::new());
    let script = once(Operation::Write, "snapshots/", How::Waits(go.clone()));
    let cluster =
        Cluster::start_with(0, script, |config| config.coordinator.snapshots_kept = 0).await;
    let spec = RunSpec {
        lag: Some(Lag {
            bound: Some(lag::Bound::AtMost(1000)),
        }),
        ..uniform(&cluster)
    };
    let run = cluster.open_run("verifies", spec).await.unwrap();
    ids(&run, 0).await;
    let push = tokio::spawn({
        let (run, weights) = (run.clone(), weights(&cluster, -1.0));
        async move { run.push_weights(0, weights).await }
    });
    while !cluster.is_played_out() {
        tokio::task::yield_now().await;
    }
    for step in 1..4 {
        assert_eq!(ids(&run, step).await.len(), 16);
    }
    assert!(!push.is_finished(), "it is still being uploaded");
    go.notify_one();
    assert_eq!(push.await.unwrap().unwrap().step, 0);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_given_up_leaves_no_half_done_rewind() {
    let go = Arc::new(Notify::new());
    let cluster = Cluster::start(
        0,
        once(Operation::Create, "generations/1", How::Waits(go.clone())),
    )
    .await;
    let run = cluster
        .open_run("cancelled", uniform(&cluster))
        .await
        .unwrap();
    ids(&run, 0).await;
    {
        let mut rewind = Box::pin(run.rewind(0, RewindMode::Reselect));
        // The script is played out when the creation waits; then the caller goes away.
        while !cluster.is_played_out() {
            assert!(futures::poll!(&mut rewind).is_pending());
            tokio::task::yield_now().await;
        }
    }
    go.notify_one();
    loop {
        let info = run.get_run().await.unwrap();
        if info.summary.unwrap().generation == 1 {
            break;
        }
        tokio::task::yield_now().await;
    }
    let error = run.select(0, 0, 1, Intent::Need).await.unwrap_err();
    assert_eq!(error.reason(), Some(Reason::GenerationStale));
    let again = cluster
        .open_run("cancelled", uniform(&cluster))
        .await
        .unwrap();
    assert_eq!((again.generation(), ids(&again, 0).await.len()), (1, 16));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_step_of_a_phase_begins_while_the_phase_is_being_written() {
    let go = Arc::new(Notify::new());
    let cluster = Cluster::start(
        0,
        once(Operation::Create, "phases/0", How::Waits(go.clone())),
    )
    .await;
    let run = cluster
        .open_run(
            "appended",
            RunSpec {
                max_ahead: 1,
                ..uniform(&cluster)
            },
        )
        .await
        .unwrap();
    ids(&run, 0).await;
    let larger = Phase {
        from_step: 1,
        super_batch_size: 96,
        sub_batch_size: 24,
        ..uniform(&cluster).phases[0].clone()
    };
    let appending = tokio::spawn({
        let run = run.clone();
        async move { run.append_phases(vec![larger]).await }
    });
    while !cluster.is_played_out() {
        tokio::task::yield_now().await;
    }
    let asking = tokio::spawn({
        let run = run.clone();
        async move { ids(&run, 1).await }
    });
    go.notify_one();
    assert_eq!(appending.await.unwrap().unwrap().phases.len(), 2);
    assert_eq!(
        asking.await.unwrap().len(),
        24,
        "of the appended phase's size"
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn data_that_cannot_be_read_for_a_moment_costs_no_row() {
    let undisturbed = Cluster::start(0, Script::default()).await;
    let expected = ids(
        &undisturbed
            .open_run("read", easy(&undisturbed))
            .await
            .unwrap(),
        0,
    )
    .await;
    undisturbed.stop().await;
    let mut cluster = Cluster::start(0, once(Operation::Read, "train.parquet", How::Fails)).await;
    // Indexing is the first to read.
    let refused = cluster.open_run("read", easy(&cluster)).await;
    let run = match refused {
        Ok(run) => run,
        Err(error) => {
            assert_eq!(error.reason(), Some(Reason::StorageUnreachable));
            cluster.open_run("read", easy(&cluster)).await.unwrap()
        }
    };
    assert_eq!(ids(&run, 0).await, expected);
    cluster.restart().await;
    let again = cluster.open_run("read", easy(&cluster)).await.unwrap();
    assert_eq!(
        ids(&again, 0).await,
        expected,
        "served again from its receipt"
    );
    assert_eq!(
        again.receipt(0, None).await.unwrap().summary.unwrap().holes,
        0
    );
    cluster.stop().await;
}

#[tokio::test]
async fn storage_that_falls_silent_is_given_up_by_name() {
    let silent = |how| Fault {
        operation: Operation::Read,
        path: "k",
        how,
        times: 1,
    };
    let script = Script::new([silent(How::Silent), silent(How::Stalls)]);
    let config = StorageConfig {
        answer_timeout_seconds: 0.05,
        stall_timeout_seconds: 0.02,
        ..StorageConfig::default()
    };
    let state = Stores::wrapped(config, script.wrap())
        .open("memory:///state")
        .unwrap();
    state.put("k", "whole".into()).await.unwrap();
    for words in ["no answer for 0.05 s", "nothing was read for 0.02 s"] {
        let error = state.get("k").await.unwrap_err();
        assert_eq!(
            (error.reason(), error.value("uri")),
            (Reason::StorageUnreachable, Some("memory:///state/k"))
        );
        assert!(error.chain().contains(words), "{}", error.chain());
    }
    assert!(script.left().is_empty());
    assert_eq!(
        state.get("k").await.unwrap(),
        "whole",
        "the next one is read"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_stalls_costs_nothing_but_time() {
    let script = once(Operation::Read, "train.parquet", How::Stalls);
    let settings = |config: &mut Config| {
        config.storage.stall_timeout_seconds = 1.0;
        config.coordinator.selector_threads = 1;
    };
    let cluster = Cluster::start_with(0, script, settings).await;
    let run = match cluster.open_run("stalled", easy(&cluster)).await {
        Ok(run) => run,
        // Indexing is the first to read.
        Err(error) => {
            assert_eq!(error.reason(), Some(Reason::StorageUnreachable));
            cluster.open_run("stalled", easy(&cluster)).await.unwrap()
        }
    };
    assert_eq!(ids(&run, 0).await.len(), 16);
    let summary = run.receipt(0, None).await.unwrap().summary.unwrap();
    assert_eq!((summary.holes, summary.selector_threads), (0, 1));
    cluster.stop().await;
}

/// Columns of images, of captions, and of 248 more texts with long names.
fn wide_parquet() -> Vec<u8> {
    let images: ArrayRef = Arc::new(BinaryArray::from_iter_values([b"x"]));
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values(["x"]));
    let others: Vec<String> = (0..248).map(|n| format!("{n:0>200}")).collect();
    let names = ["caption"]
        .into_iter()
        .chain(others.iter().map(String::as_str));
    let columns = names.map(|name| (name, texts.clone()));
    let batch = RecordBatch::try_from_iter([("image", images)].into_iter().chain(columns)).unwrap();
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.into_inner().unwrap()
}

/// An error travels in HTTP headers, which have a limit: a longer one would break the connection.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_wide_data_set_reaches_the_caller() {
    let cluster = Cluster::start(0, Script::default()).await;
    let data = cluster.uri("wide/0.parquet");
    let stores = Stores::new(StorageConfig::default());
    let file = stores.open(&data).unwrap();
    file.put("", wide_parquet().into()).await.unwrap();
    let client = Client::connect_with(cluster.address(), impatient()).await;
    let client = client.unwrap();
    type Change = fn(&mut RunSpec);
    let cases: [(Change, Reason, &str); 3] = [
        (
            |spec| spec.sources[0].caption_column = "captoin".into(),
            Reason::ColumnNotFound,
            "captoin",
        ),
        (
            |spec| spec.columns = vec!["captoin".into()],
            Reason::ColumnNotFound,
            "captoin",
        ),
        (
            |spec| spec.sources[0].uri = format!("file:///{}", "a".repeat(10_000)),
            Reason::RunSpecImpossible,
            "sources[0].uri",
        ),
    ];
    for (change, reason, named) in cases {
        let mut spec = uniform(&cluster);
        spec.sources[0].uri.clone_from(&data);
        change(&mut spec);
        let error = client.open_run("wide", spec).await.unwrap_err();
        assert_eq!(error.reason(), Some(reason), "{error}");
        assert!(error.to_string().contains(named), "{error}");
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_file_changed_under_a_run_is_refused_by_name() {
    let mut cluster = Cluster::start(0, Script::default()).await;
    let lag = Some(Lag {
        bound: Some(lag::Bound::AtMost(1000)),
    });
    let scored = RunSpec {
        lag,
        fallback: Fallback::Wait.into(),
        max_ahead: 1,
        ..cluster.spec()
    };
    let spec = |run: &str| {
        if run == "learner" {
            scored.clone()
        } else {
            RunSpec {
                max_ahead: 1,
                ..easy(&cluster)
            }
        }
    };
    let specs = ["reference", "learner"].map(|run| (run, spec(run)));
    for (run, spec) in &specs {
        let run = cluster.open_run(run, spec.clone()).await.unwrap();
        ids(&run, 0).await;
        if *run.run_id() == *"learner" {
            run.push_weights(0, weights(&cluster, 1.0)).await.unwrap();
        }
    }
    let model = Stores::new(StorageConfig::default())
        .open(&cluster.uri("model"))
        .unwrap();
    let tokenizer = model.get("tokenizer.json").await.unwrap();
    // The worker that runs has read the folder: for it nothing has changed.
    model
        .put("tokenizer.json", [&tokenizer[..], b"\n"].concat().into())
        .await
        .unwrap();
    cluster.restart().await;
    for (run, spec) in &specs {
        let run = cluster.open_run(run, spec.clone()).await.unwrap();
        let error = run.select(1, 0, 1, Intent::Need).await.unwrap_err();
        assert_eq!(error.reason(), Some(Reason::ModelInvalid), "{error}");
        assert_eq!(error.metadata()["file"], "tokenizer.json");
    }
    model.put("tokenizer.json", tokenizer).await.unwrap();
    cluster.restart().await;
    let run = cluster
        .open_run("learner", specs[1].1.clone())
        .await
        .unwrap();
    assert_eq!(ids(&run, 1).await.len(), 16, "put back, it goes on");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_run_makes_room_for_another_and_a_busy_one_does_not() {
    let go = Arc::new(Notify::new());
    let script = once(Operation::Create, "generations/1", How::Waits(go.clone()));
    let cluster = Cluster::start_with(0, script, |config| config.coordinator.max_runs = 1).await;
    // Its step 2 waits for a push that does not come.
    let first = cluster.open_run("first", cluster.spec()).await.unwrap();
    let served = ids(&first, 0).await;
    let second = cluster.open_run("second", uniform(&cluster)).await.unwrap();
    assert_eq!(ids(&second, 0).await.len(), 16);
    assert_eq!(ids(&first, 0).await, served, "it wakes where it was");
    let rewinding = tokio::spawn(async move { first.rewind(0, RewindMode::Replay).await });
    while !cluster.is_played_out() {
        tokio::task::yield_now().await;
    }
    let client = Client::connect_with(cluster.address(), impatient())
        .await
        .unwrap();
    let refused = client
        .open_run("third", uniform(&cluster))
        .await
        .unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::Overloaded), "{refused}");
    go.notify_one();
    assert_eq!(rewinding.await.unwrap().unwrap(), 1);
    cluster.open_run("third", uniform(&cluster)).await.unwrap();
    cluster.stop().await;
}

/// The model's own weights, but for the bias.
fn weights(cluster: &Cluster, bias: f32) -> Vec<Part> {
    let file = std::fs::read(Path::new(
        cluster
            .uri("model/model.safetensors")
            .trim_start_matches("file://"),
    ))
    .unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let part = |(name, tensor): (&str, safetensors::tensor::TensorView<'_>)| {
        let shape: Vec<u64> = tensor.shape().iter().map(|size| *size as u64).collect();
        match name {
            "logit_bias" => Part::f32(name, &shape, &[bias]).unwrap(),
            _ => Part::whole(name, TensorDtype::F32, &shape, tensor.data().to_vec()).unwrap(),
        }
    };
    tensors.iter().map(part).collect()
}

/// How often a run was loaded: each load claims it.
async fn claims(cluster: &Cluster, run: &str) -> usize {
    let owner = cluster.uri(&format!("state/runs/{run}/owner"));
    let stores = Stores::new(StorageConfig::default());
    let facts = stores.open(&owner).unwrap().list("").await.unwrap();
    facts.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn looking_at_other_runs_leaves_a_trainers_run_in_memory() {
    let script = Script::default();
    let cluster = Cluster::start_with(0, script, |config| config.coordinator.max_runs = 1).await;
    let looked_at = cluster.open_run("asleep", cluster.spec()).await.unwrap();
    ids(&looked_at, 0).await;
    looked_at
        .push_weights(0, weights(&cluster, 0.25))
        .await
        .unwrap();
    // All steps that can be decided are committed: step 3 waits for a push.
    ids(&looked_at, 1).await;
    ids(&looked_at, 2).await;
    let awake = looked_at.get_run().await.unwrap();
    let listed = looked_at.weights(0).await.unwrap();
    let digests = looked_at.weights_digests(None).await.unwrap();
    assert!(awake.learner.is_some() && listed.len() == 1 && !digests.1.is_empty());
    let trained = cluster
        .open_run("trained", uniform(&cluster))
        .await
        .unwrap();
    for step in 0..4 {
        ids(&trained, step).await;
        let mut asleep = looked_at.get_run().await.unwrap();
        // A receipt cannot hold how long its own commit took, so that is known in memory alone.
        let took = |info: &RunInfo| info.accounts.unwrap().seconds.unwrap();
        let commit = took(&awake).commit;
        let seconds = asleep.accounts.as_mut().unwrap().seconds.as_mut();
        seconds.unwrap().commit = commit;
        // The service knows what a trainer has consumed only while its run is in memory.
        let known = RunInfo {
            consumed_through: None,
            examples_delivered: 0,
            ..awake.clone()
        };
        assert_eq!(asleep, known);
        assert_eq!(looked_at.weights(0).await.unwrap(), listed);
        assert_eq!(looked_at.weights_digests(None).await.unwrap(), digests);
        assert_eq!(looked_at.missing_pushes(3).await.unwrap(), [1, 2]);
        assert_eq!(looked_at.receipt(1, None).await.unwrap().chosen.len(), 16);
    }
    assert_eq!(claims(&cluster, "trained").await, 1, "it stayed in memory");
    assert_eq!(claims(&cluster, "asleep").await, 1, "it slept on");
    let client = Client::connect(cluster.address()).await.unwrap();
    let missing = client.get_run("never-opened").await.unwrap_err();
    assert_eq!(missing.reason(), Some(Reason::RunNotFound));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_run_wasted_before_it_slept_is_charged_when_it_wakes() {
    let script = Script::default();
    let cluster = Cluster::start_with(0, script, |config| config.coordinator.max_runs = 1).await;
    let spec = RunSpec {
        stall_grace_seconds: Some(0.0),
        // Each step has blocks of its own, whose reference embeddings no other step has paid.
        window_blocks: 1,
        max_ahead: 1,
        ..cluster.spec()
    };
    let client = Client::connect_with(cluster.address(), impatient()).await;
    let run = client.unwrap().open_run("sleeps", spec).await.unwrap();
    ids(&run, 0).await;
    ids(&run, 1).await;
    let spent = run.get_run().await.unwrap().accounts.unwrap();
    assert_eq!(spent.discarded_flops, 0.0);
    // The reference has embedded its candidates when it turns out that no push is on its way.
    let stalled = run.select(2, 0, 1, Intent::Need).await.unwrap_err();
    assert_eq!(stalled.reason(), Some(Reason::WeightsMissing), "{stalled}");
    let other = cluster.open_run("other", uniform(&cluster)).await.unwrap();
    ids(&other, 0).await;
    let mut discarded = 0.0;
    for step in 2..8 {
        let push = i64::try_from(step).unwrap() - 2;
        run.push_weights(push, weights(&cluster, 0.25))
            .await
            .unwrap();
        ids(&run, step).await;
        let spent = run.get_run().await.unwrap().accounts.unwrap();
        discarded = spent.discarded_flops;
        if discarded > 0.0 {
            break;
        }
    }
    assert_eq!(
        discarded,
        spent.reference_flops / 2.0,
        "a step's candidates"
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_that_no_step_needs_are_deleted_but_the_newest() {
    let cluster = Cluster::start_with(0, Script::default(), |config| {
        config.coordinator.snapshots_kept = 1
    })
    .await;
    let run = cluster
        .open_run(
            "forgets",
            RunSpec {
                max_ahead: 1,
                ..cluster.spec()
            },
        )
        .await
        .unwrap();
    let mut pushed = Vec::new();
    for step in 0..4 {
        ids(&run, step).await;
        let version = run
            .push_weights(step as i64, weights(&cluster, -1.0 - step as f32))
            .await
            .unwrap();
        pushed.push(version.digest);
    }
    // Of the pushes before it, which only earlier steps were scored with, none is left when step 4
    // is decided.
    ids(&run, 4).await;
    let state = Stores::new(StorageConfig::default())
        .open(&cluster.uri("state/runs/forgets/snapshots"))
        .unwrap();
    loop {
        let kept: Vec<String> = state
            .list("")
            .await
            .unwrap()
            .into_iter()
            // Each upload has a name of its own, which begins with the digest.
            .map(|(key, _)| key.split('.').next().unwrap_or_default().to_owned())
            .collect();
        assert!(kept.contains(&pushed[3]), "{kept:?}");
        if !kept.contains(&pushed[0]) && !kept.contains(&pushed[1]) {
            break;
        }
        tokio::task::yield_now().await;
    }
    cluster.stop().await;
}
