//! Batches that workers send to ranks, and batches that ranks read themselves: the same rows as
//! those that the coordinator sends.
#![allow(clippy::unwrap_used)]
use arrow::{
    array::{Array, AsArray, RecordBatch},
    datatypes::{UInt32Type, UInt64Type},
};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use std::fs::File;
use superbatch_client::{
    Client, Run,
    v1::{
        BatchHeader, BatchTrailer, Criterion, Delivery, FetchTicketRequest, Intent, Phase, Policy,
        Reason, ReceiptSummary, RewindMode, RunSpec, SelectBatchRequest, Source, Ticket,
        TicketDone, delivery_service_client::DeliveryServiceClient, fetch_ticket_response,
        select_batch_response::Message, selection_service_client::SelectionServiceClient,
    },
};
use superbatch_proto::{Checksum, Failure};
use superbatch_server::dataset::content_hash;
use superbatch_tests::{cluster::Cluster, faults::Script, fixture::Row};

const RANKS: u32 = 2;

/// A run that needs no pushes.
fn spec(cluster: &Cluster, delivery: Delivery) -> RunSpec {
    let mut spec = cluster.spec();
    spec.phases[0].criterion = Criterion::Easy.into();
    spec.columns = vec!["n".into()];
    spec.delivery = delivery.into();
    spec
}

/// The answer to one call, as it came.
struct Answer {
    header: BatchHeader,
    bytes: Vec<u8>,
    trailer: BatchTrailer,
}

fn request(run: &Run, step: u64, delivery: Delivery) -> SelectBatchRequest {
    SelectBatchRequest {
        run_id: run.run_id().to_owned(),
        generation: run.generation(),
        step,
        world_size: RANKS,
        incarnation: "raw".into(),
        intent: Intent::Need.into(),
        delivery: delivery.into(),
        ..Default::default()
    }
}

async fn ask(cluster: &Cluster, request: SelectBatchRequest) -> Result<Answer, Failure> {
    let failed = |status| Failure::try_from(status).unwrap();
    let mut client = SelectionServiceClient::connect(cluster.address().to_owned())
        .await
        .unwrap();
    let mut stream = client
        .select_batch(request)
        .await
        .map_err(failed)?
        .into_inner();
    let (mut header, mut bytes) = (None, Vec::new());
    loop {
        match stream.message().await.map_err(failed)?.unwrap().message {
            Some(Message::Header(found)) => header = Some(found),
            Some(Message::ArrowIpc(part)) => bytes.extend_from_slice(&part),
            Some(Message::Trailer(trailer)) => {
                return Ok(Answer {
                    header: header.unwrap(),
                    bytes,
                    trailer,
                });
            }
            None => {}
        }
    }
}

async fn fetch(
    address: &str,
    ticket: &[u8],
    resume_offset: u64,
) -> Result<(Vec<u8>, TicketDone), Failure> {
    let failed = |status| Failure::try_from(status).unwrap();
    // No token: the ticket is the permission.
    let mut client = DeliveryServiceClient::connect(address.to_owned())
        .await
        .unwrap();
    let request = FetchTicketRequest {
        ticket: ticket.to_vec().into(),
        resume_offset,
    };
    let mut stream = client
        .fetch_ticket(request)
        .await
        .map_err(failed)?
        .into_inner();
    let mut bytes = Vec::new();
    loop {
        match stream.message().await.map_err(failed)?.unwrap().message {
            Some(fetch_ticket_response::Message::ArrowIpc(part)) => bytes.extend_from_slice(&part),
            Some(fetch_ticket_response::Message::Done(done)) => return Ok((bytes, done)),
            None => {}
        }
    }
}

/// Why a ticket was refused.
async fn refusal(address: &str, ticket: &[u8]) -> (Reason, Option<String>) {
    let failure = fetch(address, ticket, 0).await.unwrap_err();
    (failure.reason, failure.metadata.get("why").cloned())
}

async fn batches(run: &Run, steps: u64) -> Vec<(RecordBatch, ReceiptSummary)> {
    let mut all = Vec::new();
    for step in 0..steps {
        for rank in 0..RANKS {
            let batch = run.select(step, rank, RANKS, Intent::Need).await.unwrap();
            all.push((batch.record_batch, batch.receipt));
        }
    }
    all
}

/// The rows of all batches.
fn rows(batches: &[(RecordBatch, ReceiptSummary)]) -> Vec<RecordBatch> {
    batches.iter().map(|(rows, _)| rows.clone()).collect()
}

async fn open(cluster: &Cluster, id: &str, spec: RunSpec) -> (Client, Run) {
    let client = Client::connect(cluster.address()).await.unwrap();
    let run = client.open_run(id, spec).await.unwrap();
    (client, run)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_direct_batch_is_the_coordinators_to_the_byte() {
    let cluster = Cluster::start(2, Script::default()).await;
    for (name, policy) in [("scored", Policy::Joint), ("uniform", Policy::Uniform)] {
        let with = |delivery| {
            let mut spec = spec(&cluster, delivery);
            spec.phases[0].policy = policy.into();
            spec
        };
        let id = |way: &str| format!("{name}-{way}");
        let (_, through) = open(&cluster, &id("coordinator"), with(Delivery::Coordinator)).await;
        let (client, direct) = open(&cluster, &id("direct"), with(Delivery::Direct)).await;
        let expected = batches(&through, 3).await;
        let found = batches(&direct, 3).await;
        assert!(rows(&found) == rows(&expected), "{name}");
        assert_eq!(client.direct_batches(), (6, 0), "all came from workers");
        for step in 0..3 {
            let [a, b] = [through.receipt(step, None), direct.receipt(step, None)];
            assert_eq!(a.await.unwrap().chosen, b.await.unwrap().chosen, "{name}");
        }
        // What the coordinator streams itself has the bytes and the checksum of the other run's.
        let mut same = Vec::new();
        for run in [&through, &direct] {
            let answer = ask(&cluster, request(run, 1, Delivery::Coordinator)).await;
            let answer = answer.unwrap();
            assert!(answer.header.tickets.is_empty());
            same.push((answer.bytes, answer.trailer.xxh3));
        }
        assert!(same[0] == same[1], "{name}");
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tickets_name_each_row_once_and_their_streams_resume() {
    let cluster = Cluster::start(2, Script::default()).await;
    let (_, run) = open(&cluster, "run", spec(&cluster, Delivery::Direct)).await;
    let answer = ask(&cluster, request(&run, 0, Delivery::Direct))
        .await
        .unwrap();
    let tickets = &answer.header.tickets;
    assert_eq!(tickets.len(), 2, "each worker has scored a half");
    let mut named: Vec<u32> = tickets.iter().flat_map(|t| t.rows.clone()).collect();
    named.sort_unstable();
    assert!(named.into_iter().eq(0..8));
    for ticket in tickets {
        let (whole, done) = fetch(&ticket.address, &ticket.ticket, 0).await.unwrap();
        assert_eq!(done.rows as usize, ticket.rows.len());
        assert_eq!(done.stream_bytes as usize, whole.len());
        assert!(done.stream_bytes <= ticket.stream_bytes_max);
        let mut checksum = Checksum::default();
        checksum.update(&whole);
        assert_eq!(done.xxh3[..], checksum.finish()[..]);
        for offset in [1, whole.len() / 2, whole.len()] {
            let rest = fetch(&ticket.address, &ticket.ticket, offset as u64).await;
            let (rest, again) = rest.unwrap();
            assert!(rest == whole[offset..] && again == done, "{offset}");
        }
        let beyond = fetch(&ticket.address, &ticket.ticket, whole.len() as u64 + 1).await;
        assert_eq!(beyond.unwrap_err().reason, Reason::InvalidArgument);
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_lost_between_ticket_and_fetch_costs_a_fallback() {
    let mut cluster = Cluster::start(2, Script::default()).await;
    let (_, through) = open(
        &cluster,
        "coordinator",
        spec(&cluster, Delivery::Coordinator),
    )
    .await;
    let expected = batches(&through, 2).await;
    let (client, run) = open(&cluster, "direct", spec(&cluster, Delivery::Direct)).await;
    // The step is decided, and its rows are on both workers.
    let answer = ask(&cluster, request(&run, 0, Delivery::Direct))
        .await
        .unwrap();
    assert_eq!(answer.header.tickets.len(), 2);
    cluster.stop_worker(0).await;
    let found = batches(&run, 2).await;
    assert!(rows(&found) == rows(&expected));
    let (direct, fallbacks) = client.direct_batches();
    assert!(fallbacks >= 1, "step 0 needs the worker that is gone");
    assert_eq!(direct + fallbacks, 4);
    let gone = answer.header.tickets.iter().map(|ticket| async move {
        let connected = DeliveryServiceClient::connect(ticket.address.clone()).await;
        connected.is_err()
    });
    let gone = futures::future::join_all(gone).await;
    assert_eq!(gone.iter().filter(|gone| **gone).count(), 1);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_that_is_forged_or_anothers_is_refused() {
    let cluster = Cluster::start(2, Script::default()).await;
    let (client, run) = open(&cluster, "run", spec(&cluster, Delivery::Direct)).await;
    let answer = ask(&cluster, request(&run, 0, Delivery::Direct))
        .await
        .unwrap();
    let [a, b]: [Ticket; 2] = answer.header.tickets.try_into().unwrap();
    let forged = |why: &str| (Reason::TicketRefused, Some(why.to_owned()));
    assert_eq!(refusal(&b.address, &a.ticket).await, forged("forged"));
    let mut changed = a.ticket.to_vec();
    changed[3] ^= 1;
    assert_eq!(refusal(&a.address, &changed).await, forged("forged"));
    assert_eq!(refusal(&a.address, b"short").await, forged("damaged"));
    assert_eq!(refusal(&a.address, &[]).await, forged("damaged"));
    assert!(fetch(&a.address, &a.ticket, 0).await.is_ok());
    // Rows of a run that is closed are let go.
    client.close_run("run").await.unwrap();
    loop {
        match fetch(&a.address, &a.ticket, 0).await {
            Ok(_) => tokio::task::yield_now().await,
            Err(failure) => {
                assert_eq!(failure.reason, Reason::RowsNotKept);
                break;
            }
        }
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_that_has_expired_is_refused_and_costs_a_fallback() {
    let settings = |config: &mut superbatch_server::config::Config| {
        config.coordinator.ticket_seconds = 1e-9;
    };
    let cluster = Cluster::start_with(2, Script::default(), settings).await;
    let (_, run) = open(&cluster, "run", spec(&cluster, Delivery::Direct)).await;
    let answer = ask(&cluster, request(&run, 0, Delivery::Direct))
        .await
        .unwrap();
    let ticket = &answer.header.tickets[0];
    let failure = loop {
        match fetch(&ticket.address, &ticket.ticket, 0).await {
            Ok(_) => {}
            Err(failure) => break failure,
        }
    };
    assert_eq!(failure.reason, Reason::TicketRefused);
    assert_eq!(failure.metadata["why"], "expired");
    let batch = run.select(0, 1, RANKS, Intent::Need).await.unwrap();
    assert_eq!(batch.record_batch.num_rows(), 8);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_without_room_leave_the_rows_to_the_coordinator() {
    let settings = |config: &mut superbatch_server::config::Config| {
        config.worker.held_bytes_max = 1;
    };
    let cluster = Cluster::start_with(2, Script::default(), settings).await;
    let (client, run) = open(&cluster, "run", spec(&cluster, Delivery::Direct)).await;
    let (_, through) = open(
        &cluster,
        "coordinator",
        spec(&cluster, Delivery::Coordinator),
    )
    .await;
    assert!(rows(&batches(&run, 2).await) == rows(&batches(&through, 2).await));
    assert_eq!(client.direct_batches(), (0, 0), "no tickets were given");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_run_is_served_directly_again() {
    let mut cluster = Cluster::start(2, Script::default()).await;
    let spec = || spec(&cluster, Delivery::Direct);
    let (_, run) = open(&cluster, "run", spec()).await;
    let before = batches(&run, 2).await;
    // A replay serves the receipts' rows.
    run.rewind(0, RewindMode::Replay).await.unwrap();
    let (client, run) = open(&cluster, "run", spec()).await;
    assert!(rows(&batches(&run, 2).await) == rows(&before));
    assert_eq!(client.direct_batches(), (4, 0));
    // So does another coordinator, on other workers.
    let opened = spec();
    cluster.restart_with_workers().await;
    let (client, run) = open(&cluster, "run", opened.clone()).await;
    assert!(rows(&batches(&run, 2).await) == rows(&before));
    assert_eq!(client.direct_batches(), (4, 0));
    // One whose worker is in its own process streams them itself.
    cluster.restart().await;
    let (client, run) = open(&cluster, "run", opened).await;
    assert!(rows(&batches(&run, 2).await) == rows(&before));
    assert_eq!(client.direct_batches(), (0, 0));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_for_a_delivery_that_the_run_has_not_is_refused() {
    let cluster = Cluster::start(0, Script::default()).await;
    let (_, run) = open(&cluster, "run", spec(&cluster, Delivery::Locators)).await;
    let refused = ask(&cluster, request(&run, 0, Delivery::Coordinator)).await;
    let failure = refused.err().unwrap();
    assert_eq!(failure.reason, Reason::InvalidArgument);
    assert_eq!(failure.metadata["field"], "delivery");
    let changed = spec(&cluster, Delivery::Direct);
    let error = cluster.open_run("run", changed).await.err().unwrap();
    assert_eq!(error.reason(), Some(Reason::RunSpecConflict));
    assert_eq!(error.metadata()["field"], "delivery");
    cluster.stop().await;
}

/// Image and caption at a locator, read as a trainer would.
fn read(batch: &RecordBatch, row: usize) -> (Vec<u8>, String) {
    let text = |name: &str| batch[name].as_string::<i32>().value(row).to_owned();
    let path = text("_superbatch_uri").replace("file://", "");
    let offset = batch["_superbatch_image_offset"].as_primitive::<UInt64Type>();
    if offset.is_valid(row) {
        let length = batch["_superbatch_image_length"].as_primitive::<UInt64Type>();
        let (start, length) = (offset.value(row) as usize, length.value(row) as usize);
        let tar = std::fs::read(path).unwrap();
        return (tar[start..start + length].to_vec(), text("caption"));
    }
    let group = batch["_superbatch_row_group"].as_primitive::<UInt32Type>();
    let place = batch["_superbatch_row_in_group"].as_primitive::<UInt64Type>();
    let file = ParquetRecordBatchReaderBuilder::try_new(File::open(path).unwrap()).unwrap();
    let reader = file.with_row_groups(vec![group.value(row) as usize]);
    let mut reader = reader.with_batch_size(1 << 16).build().unwrap();
    let (found, row) = (reader.next().unwrap().unwrap(), place.value(row) as usize);
    let image = found["image"].as_binary::<i32>().value(row).to_vec();
    let caption = found["caption"].as_string::<i32>().value(row).to_owned();
    (image, caption)
}

fn write_tar(path: &std::path::Path) {
    let mut builder = tar::Builder::new(File::create(path).unwrap());
    for n in 0..96 {
        let row = Row::good(n);
        let members = [
            ("png", row.image.unwrap()),
            ("txt", row.caption.unwrap().into_bytes()),
        ];
        for (ending, content) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            let name = format!("{n:05}.{ending}");
            builder
                .append_data(&mut header, name, &content[..])
                .unwrap();
        }
    }
    builder.into_inner().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn locators_lead_to_the_rows_that_were_chosen() {
    let cluster = Cluster::start(2, Script::default()).await;
    let tars = cluster.uri("tars").replace("file://", "");
    std::fs::create_dir_all(&tars).unwrap();
    write_tar(&std::path::Path::new(&tars).join("0.tar"));
    let parquet = spec(&cluster, Delivery::Locators);
    let tar = RunSpec {
        sources: vec![Source {
            uri: format!("file://{tars}"),
            ..Default::default()
        }],
        columns: Vec::new(),
        phases: vec![Phase {
            super_batch_size: 48,
            ..parquet.phases[0].clone()
        }],
        ..parquet.clone()
    };
    for (id, spec) in [("parquet", parquet), ("tar", tar)] {
        let (_, located) = open(&cluster, id, spec.clone()).await;
        let whole = RunSpec {
            delivery: Delivery::Coordinator.into(),
            ..spec
        };
        let (_, whole) = open(&cluster, &format!("{id}-whole"), whole).await;
        let (found, expected) = (batches(&located, 2).await, batches(&whole, 2).await);
        for ((found, _), (expected, _)) in found.iter().zip(&expected) {
            assert!(found.column_by_name("image").is_none());
            for shared in ["caption", "_superbatch_id", "_superbatch_score"] {
                assert!(
                    found[shared].as_ref() == expected[shared].as_ref(),
                    "{id} {shared}"
                );
            }
            for row in 0..found.num_rows() {
                let (image, caption) = read(found, row);
                assert_eq!(image, expected["image"].as_binary::<i32>().value(row));
                let hash = found["_superbatch_content_hash"].as_fixed_size_binary();
                assert_eq!(hash.value(row), content_hash(&image, &caption));
            }
        }
        let receipts = [located.receipt(1, None), whole.receipt(1, None)];
        let [a, b] = receipts;
        assert_eq!(a.await.unwrap().chosen, b.await.unwrap().chosen);
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_the_same_bytes_from_any_workers_and_however_often_it_is_asked_for() {
    let mut expected: Option<Vec<Vec<u8>>> = None;
    // 0: the embedded worker, which hands its record batches over.
    for workers in [0, 2] {
        let cluster = Cluster::start(workers, Script::default()).await;
        let mut uniform = cluster.spec();
        uniform.phases[0].policy = Policy::Uniform.into();
        uniform.columns = vec!["n".into()];
        let run = cluster.open_run("bytes", uniform).await.unwrap();
        let asked = |rank, resume_offset| SelectBatchRequest {
            rank,
            resume_offset,
            ..request(&run, 0, Delivery::Coordinator)
        };
        let mut streams = Vec::new();
        for rank in 0..RANKS {
            let first = ask(&cluster, asked(rank, 0)).await.unwrap();
            assert_eq!(first.trailer.xxh3[..], Checksum::of(&first.bytes));
            // These are of the stream that is kept.
            for from in [0, 100] {
                let again = ask(&cluster, asked(rank, from)).await.unwrap();
                assert_eq!(again.header.stream_bytes, first.bytes.len() as u64);
                assert!(
                    again.bytes[..] == first.bytes[from as usize..],
                    "{rank} {from}"
                );
                assert_eq!(again.trailer, first.trailer);
            }
            streams.push(first.bytes);
        }
        assert!(*expected.get_or_insert_with(|| streams.clone()) == streams);
        cluster.stop().await;
    }
}
