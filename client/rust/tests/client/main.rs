//! The client against a real server in this process, whose answers are scripted.
#![allow(clippy::unwrap_used)]
mod fake;
mod lost;

use fake::{Answer, Fake, STEPS, TestResult, cut_once, fast, open_at, rows};
use futures::{FutureExt, StreamExt};
use std::{sync::Arc, time::Duration};
use superbatch_client::{
    BatchesConfig, Client, Error, Part, Push, Pusher, Retry,
    v1::{Intent, Reason, RewindMode, RunSpec, TensorDtype, push_weights_request::Message},
};
use superbatch_proto::Checksum;

const MIB: usize = 1 << 20;

#[tokio::test]
async fn a_batch_is_put_together_and_decoded() -> TestResult {
    let fake = Arc::new(Fake::default());
    let run = fake.open(fast()).await?.with_incarnation("start-7");
    let batch = run.select(3, 1, 2, Intent::Need).await?;
    assert_eq!(batch.record_batch, rows(3)?);
    assert_eq!(
        (
            batch.step,
            batch.rank,
            batch.world_size,
            batch.receipt.sub_batch_size
        ),
        (3, 1, 2, 8)
    );
    assert_eq!(run.schema(), &rows(0)?.schema());
    let asked = &fake.asked()[0];
    assert_eq!(
        (asked.generation, asked.incarnation.as_str(), asked.intent()),
        (1, "start-7", Intent::Need)
    );
    assert_eq!(
        (asked.consumed_through, asked.pushing_through),
        (None, None)
    );
    Ok(())
}

#[tokio::test]
async fn a_broken_stream_is_resumed_where_it_broke() -> TestResult {
    let fake = Arc::new(Fake::default());
    fake.script(
        0,
        [
            Answer::BreakAfter(MIB),
            Answer::EndAfter(MIB / 2),
            Answer::BreakAfter(0),
        ],
    );
    let batch = fake
        .open(fast())
        .await?
        .select(0, 0, 1, Intent::Need)
        .await?;
    assert_eq!(batch.record_batch, rows(0)?);
    let offsets: Vec<_> = fake
        .asked()
        .iter()
        .map(|request| request.resume_offset as usize)
        .collect();
    // An error may overtake the last part of its stream, but what arrived is never asked for again.
    assert!(
        offsets.is_sorted() && offsets.len() == 4 && fake.script_is_spent(),
        "{offsets:?}"
    );
    assert!(offsets[3] >= MIB / 2, "{offsets:?}");
    Ok(())
}

#[tokio::test]
async fn a_cut_connection_is_made_again_and_its_stream_resumed() -> TestResult {
    let fake = Arc::new(Fake::default());
    let way = cut_once(fake.serve().await?, 2 * MIB as u64).await?;
    let batch = open_at(way, fast())
        .await?
        .select(0, 0, 1, Intent::Need)
        .await?;
    assert_eq!(batch.record_batch, rows(0)?);
    let offsets: Vec<_> = fake
        .asked()
        .iter()
        .map(|request| request.resume_offset as usize)
        .collect();
    assert!(
        offsets.len() == 2 && offsets[1] > 0 && offsets[1] <= 2 * MIB,
        "{offsets:?}"
    );
    Ok(())
}

#[tokio::test]
async fn damaged_bytes_are_found_and_asked_for_again_from_the_start() -> TestResult {
    let fake = Arc::new(Fake::default());
    fake.script(0, [Answer::Damage(2 * MIB)]);
    let run = fake.open(fast()).await?;
    assert_eq!(
        run.select(0, 0, 1, Intent::Need).await?.record_batch,
        rows(0)?
    );
    assert_eq!(
        fake.asked()
            .iter()
            .map(|request| request.resume_offset)
            .collect::<Vec<_>>(),
        [0, 0]
    );

    fake.script(
        1,
        [
            Answer::Damage(MIB),
            Answer::Damage(MIB),
            Answer::Damage(MIB),
            Answer::Damage(MIB),
        ],
    );
    let error = run
        .select(1, 0, 1, Intent::Need)
        .await
        .expect_err("it is damaged each time");
    assert!(
        matches!(&error, Error::GaveUp { last, .. } if matches!(**last, Error::Corrupt { .. })),
        "{error}"
    );
    assert_eq!(error.reason_name(), "BATCH_CORRUPT");
    Ok(())
}

#[tokio::test]
async fn retries_are_for_faults_that_pass_and_are_bounded() -> TestResult {
    let fake = Arc::new(Fake::default());
    let run = fake.open(fast()).await?;
    fake.script(
        0,
        [
            Answer::Refuse(Reason::Overloaded),
            Answer::Refuse(Reason::ShuttingDown),
        ],
    );
    assert_eq!(run.select(0, 0, 1, Intent::Need).await?.step, 0);

    fake.script(1, vec![Answer::Refuse(Reason::NoWorkers); 4]);
    let error = run
        .select(1, 0, 1, Intent::Need)
        .await
        .expect_err("there are never workers");
    assert!(
        matches!(error, Error::GaveUp { attempts: 4, .. }),
        "{error}"
    );
    assert_eq!(error.reason(), Some(Reason::NoWorkers));
    assert!(fake.script_is_spent());

    fake.script(2, [Answer::Refuse(Reason::WorldSizeInvalid)]);
    let error = run
        .select(2, 0, 1, Intent::Need)
        .await
        .expect_err("it is refused");
    assert!(matches!(error, Error::Refused(_)), "{error}");
    assert_eq!(
        fake.asked()
            .iter()
            .filter(|request| request.step == 2)
            .count(),
        1
    );
    Ok(())
}

#[tokio::test]
async fn an_absent_service_and_a_bad_uri_are_told_at_once() -> TestResult {
    let port = std::net::TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .port();
    let error = Client::connect(format!("http://127.0.0.1:{port}"))
        .await
        .expect_err("nobody listens");
    assert!(matches!(error, Error::Connect { .. }), "{error}");
    assert_eq!(error.reason_name(), "UNAVAILABLE");
    for uri in ["127.0.0.1:50051", "ftp://localhost:50051", ""] {
        let error = Client::connect(uri).await.expect_err("not a uri of ours");
        assert!(
            matches!(error, Error::Invalid { field: "uri", .. }),
            "{error}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_message_over_the_limit_is_told_and_not_asked_for_again() -> TestResult {
    let fake = Arc::new(Fake::default());
    fake.script(0, [Answer::TooLong]);
    let error = fake
        .open(fast())
        .await?
        .select(0, 0, 1, Intent::Need)
        .await
        .expect_err("it is too long");
    assert_eq!(
        (error.reason_name(), fake.asked().len()),
        ("MESSAGE_TOO_LARGE", 1),
        "{error}"
    );
    Ok(())
}

#[tokio::test]
async fn batches_come_in_order_and_end_with_the_data() -> TestResult {
    let fake = Arc::new(Fake::default());
    let run = fake.open(fast()).await?;
    let config = BatchesConfig {
        start_step: 2,
        prefetch: 9,
        ..BatchesConfig::default()
    };
    let mut batches = run.batches(config)?;
    let mut steps = Vec::new();
    while let Some(batch) = batches.next().await {
        steps.push(batch?.step);
    }
    assert_eq!(steps, (2..STEPS).collect::<Vec<_>>());
    assert!(batches.next().await.is_none());
    for request in fake.asked() {
        // Asking for a step says that those before it are done with, and the run allows two steps
        // beyond that.
        let consumed = request.consumed_through.expect("it started at step 2");
        assert!(
            consumed < request.step && request.step <= consumed + 2,
            "{request:?}"
        );
    }

    let config = BatchesConfig {
        end_step: Some(2),
        ..BatchesConfig::default()
    };
    let steps: Vec<_> = run
        .batches(config)?
        .map(|batch| batch.map(|batch| batch.step))
        .collect()
        .await;
    assert_eq!(steps.into_iter().collect::<Result<Vec<_>, _>>()?, [0, 1]);
    Ok(())
}

#[tokio::test]
async fn a_prefetch_becomes_a_need_when_the_trainer_waits() -> TestResult {
    let fake = Arc::new(Fake::default());
    fake.script(1, [Answer::Ignore]);
    let run = fake.open(fast()).await?;
    let mut batches = run.batches(BatchesConfig {
        end_step: Some(2),
        ..BatchesConfig::default()
    })?;
    assert_eq!(
        batches.next().await.transpose()?.map(|batch| batch.step),
        Some(0)
    );
    fake.asked_for(|request| request.step == 1).await?;
    assert!(
        fake.asked()
            .iter()
            .filter(|request| request.step == 1)
            .all(|request| request.intent() == Intent::Prefetch)
    );

    let batch = batches.next().await.transpose()?.ok_or("step 1 exists")?;
    assert_eq!(batch.record_batch, rows(1)?);
    let needs: Vec<_> = fake
        .asked()
        .into_iter()
        .filter(|r| r.step == 1 && r.intent() == Intent::Need)
        .collect();
    assert_eq!(needs.len(), 1);
    assert_eq!(needs[0].consumed_through, Some(0));
    assert!(fake.script_is_spent());
    Ok(())
}

#[tokio::test]
async fn a_refused_prefetch_is_no_news_until_the_step_is_needed() -> TestResult {
    let fake = Arc::new(Fake::default());
    fake.script(
        1,
        [
            Answer::Refuse(Reason::StepBeyondAhead),
            Answer::Refuse(Reason::NeedDeadline),
        ],
    );
    let run = fake.open(fast()).await?;
    let mut batches = run.batches(BatchesConfig {
        end_step: Some(2),
        ..BatchesConfig::default()
    })?;
    assert_eq!(
        batches.next().await.transpose()?.map(|batch| batch.step),
        Some(0)
    );
    let error = batches
        .next()
        .await
        .ok_or("step 1 exists")?
        .expect_err("the need is refused");
    assert_eq!(error.reason(), Some(Reason::NeedDeadline));
    // The trainer may ask again.
    assert_eq!(
        batches.next().await.transpose()?.map(|batch| batch.step),
        Some(1)
    );
    assert!(fake.script_is_spent());
    Ok(())
}

#[tokio::test]
async fn patience_is_for_steps_that_take_long_and_not_for_refused_ones() -> TestResult {
    let fake = Arc::new(Fake::default());
    fake.script(0, [Answer::Refuse(Reason::WorldSizeInvalid)]);
    let config = BatchesConfig {
        need_after: Duration::from_secs(600),
        ..BatchesConfig::default()
    };
    let mut batches = fake.open(fast()).await?.batches(config)?;
    let refused = tokio::time::timeout(Duration::from_secs(20), batches.next()).await?;
    let error = refused.ok_or("step 0 exists")?.expect_err("it is refused");
    assert_eq!(error.reason(), Some(Reason::WorldSizeInvalid));
    Ok(())
}

#[tokio::test]
async fn what_is_read_ahead_is_not_consumed() -> TestResult {
    let fake = Arc::new(Fake::default());
    let run = fake.open(fast()).await?;
    let config = BatchesConfig {
        read_ahead: 1,
        end_step: Some(4),
        ..BatchesConfig::default()
    };
    let batches: Vec<_> = run.batches(config)?.collect().await;
    assert_eq!(batches.len(), 4);
    for request in fake.asked() {
        assert_eq!(
            request.consumed_through,
            request.step.checked_sub(2),
            "{request:?}"
        );
    }
    let refused = run.batches(BatchesConfig {
        read_ahead: 2,
        ..BatchesConfig::default()
    });
    assert!(matches!(
        refused,
        Err(Error::Invalid {
            field: "read_ahead",
            ..
        })
    ));
    Ok(())
}

#[tokio::test]
async fn streams_can_share_out_the_steps() -> TestResult {
    let fake = Arc::new(Fake::default());
    let run = fake.open(fast()).await?;
    let shared = |start_step| BatchesConfig {
        start_step,
        stride: 2,
        read_ahead: 1,
        ..BatchesConfig::default()
    };
    for start in [0, 1] {
        let steps: Vec<_> = run
            .batches(shared(start))?
            .map(|batch| batch.map(|batch| batch.step))
            .collect()
            .await;
        assert_eq!(
            steps.into_iter().collect::<Result<Vec<_>, _>>()?,
            [start, start + 2, start + 4]
        );
    }
    for request in fake.asked() {
        // What the other stream has, the trainer may still be working on.
        assert_eq!(
            request.consumed_through,
            request.step.checked_sub(2),
            "{request:?}"
        );
    }
    let refused = run.batches(BatchesConfig {
        stride: 0,
        ..BatchesConfig::default()
    });
    assert!(matches!(
        refused,
        Err(Error::Invalid {
            field: "stride",
            ..
        })
    ));
    Ok(())
}

#[tokio::test]
async fn weights_are_cut_into_parts_with_checksums() -> TestResult {
    let fake = Arc::new(Fake::default());
    fake.publish.send_replace(true);
    let run = fake.open(fast()).await?;
    let data: Vec<u8> = (0..2 * MIB + 8).map(|i| (i % 251) as u8).collect();
    let big = Part::whole("big", TensorDtype::F16, &[(MIB + 4) as u64], data.clone())?;
    let version = run
        .push_weights(4, vec![big, Part::f32("scale", &[], &[2.0])?])
        .await?;
    assert_eq!(version.step, 4);

    let pushed = fake.pushed.lock().map_err(|_| "poisoned")?;
    let messages: Vec<_> = pushed[0]
        .iter()
        .filter_map(|request| request.message.clone())
        .collect();
    let [
        Message::Start(start),
        // As in the file: wider numbers come first.
        Message::Part(_),
        Message::Data(scale),
        Message::Part(part),
        pieces @ ..,
    ] = &messages[..]
    else {
        return Err(format!("{} messages", messages.len()).into());
    };
    assert_eq!(
        (
            start.push_id.as_str(),
            start.step,
            start.expected_parts,
            start.generation
        ),
        ("g1-s4", 4, 0, 1)
    );
    assert_eq!(part.xxh3[..], Checksum::of(&data));
    assert_eq!(scale[..], 2.0f32.to_le_bytes());
    let pieces: Vec<&[u8]> = pieces
        .iter()
        .map(|piece| {
            if let Message::Data(data) = piece {
                &data[..]
            } else {
                &[]
            }
        })
        .collect();
    assert!(pieces.iter().all(|piece| piece.len() <= MIB));
    assert_eq!(pieces.concat(), data);
    Ok(())
}

#[tokio::test]
async fn the_pusher_blocks_when_full_tells_errors_once_and_flushes() -> TestResult {
    let fake = Arc::new(Fake::default());
    let run = fake
        .open(Retry {
            attempts_max: 1,
            ..fast()
        })
        .await?;
    let pusher = Pusher::start(&run, 1);
    let push = |step| Push::whole(step, Part::f32("w", &[1], &[1.0]).into_iter().collect());
    // One is under way and one waits; the third finds no room while the first is not published.
    pusher.push(push(0)).await?;
    pusher.push(push(1)).await?;
    assert!(pusher.push(push(2)).now_or_never().is_none());
    let batch = run.select(0, 0, 1, Intent::Need).await?;
    assert_eq!(batch.step, 0);
    assert_eq!(fake.asked()[0].pushing_through, Some(1));

    fake.publish.send_replace(true);
    assert_eq!(pusher.flush().await?.map(|version| version.step), Some(1));
    fake.refuse_pushes
        .lock()
        .map_err(|_| "poisoned")?
        .push_back(Reason::WeightsRefused);
    pusher.push(push(2)).await?;
    let error = pusher.flush().await.expect_err("a push was refused");
    assert_eq!(error.reason(), Some(Reason::WeightsRefused));
    assert_eq!(error.metadata()["tensor"], "w");
    pusher.push(push(3)).await?;
    assert_eq!(pusher.flush().await?.map(|version| version.step), Some(3));
    Ok(())
}

#[tokio::test]
async fn weights_that_will_not_come_are_not_said_to_be_on_their_way() -> TestResult {
    let fake = Arc::new(Fake::default());
    let run = fake
        .open(Retry {
            attempts_max: 1,
            ..fast()
        })
        .await?;
    let parts = || Part::f32("w", &[1], &[1.0]).into_iter().collect();
    let refuse = |reason| {
        fake.refuse_pushes
            .lock()
            .map(|mut refused| refused.push_back(reason))
            .map_err(|_| "poisoned")
    };
    fake.publish.send_replace(true);
    run.push_weights(0, parts()).await?;

    refuse(Reason::WeightsRefused)?;
    run.push_weights(1, parts())
        .await
        .expect_err("it is refused");
    refuse(Reason::Overloaded)?;
    let pusher = Pusher::start(&run, 1);
    pusher.push(Push::whole(2, parts())).await?;
    let given_up = pusher
        .flush()
        .await
        .expect_err("it is refused at its only attempt");
    assert!(matches!(given_up, Error::GaveUp { .. }), "{given_up}");
    fake.publish.send_replace(false);
    assert!(
        run.push_weights(3, parts()).now_or_never().is_none(),
        "it waits until it is dropped"
    );
    run.select(0, 0, 1, Intent::Need).await?;
    assert_eq!(fake.asked()[0].pushing_through, Some(0));

    // One that is on its way still counts while another of its step fails.
    pusher.push(Push::whole(4, parts())).await?;
    assert!(
        run.push_weights(4, parts()).now_or_never().is_none(),
        "it waits until it is dropped"
    );
    run.select(1, 0, 1, Intent::Need).await?;
    assert_eq!(fake.asked()[1].pushing_through, Some(4));
    Ok(())
}

#[tokio::test]
async fn the_service_hears_of_a_push_when_it_is_called_and_when_it_is_given_up() -> TestResult {
    let fake = Arc::new(Fake::default());
    let run = fake
        .open(Retry {
            attempts_max: 1,
            ..fast()
        })
        .await?;
    let pusher = Pusher::start(&run, 1);
    let push = |step, rank| Push {
        rank,
        ..Push::whole(step, Part::f32("w", &[1], &[1.0]).into_iter().collect())
    };
    // One is under way and one waits; of the third, which finds no room, the service hears as well.
    pusher.push(push(0, 0)).await?;
    pusher.push(push(1, 0)).await?;
    let mut third = Box::pin(pusher.push(push(2, 3)));
    let heard = tokio::select! {
        _ = &mut third => return Err("there is no room".into()),
        heard = fake.announced(3) => heard?,
    };
    assert_eq!(heard, [(0, 0, false), (1, 0, false), (2, 3, false)]);
    drop(third);
    assert_eq!(fake.announced(4).await?[3], (2, 3, true));

    // What is published is not withdrawn, and what is refused is.
    fake.publish.send_replace(true);
    pusher.flush().await?;
    fake.refuse_pushes
        .lock()
        .map_err(|_| "poisoned")?
        .push_back(Reason::WeightsRefused);
    pusher.push(push(3, 0)).await?;
    pusher.flush().await.expect_err("it is refused");
    let heard = fake.announced(6).await?;
    assert_eq!(heard[4..], [(3, 0, false), (3, 0, true)]);
    Ok(())
}

#[tokio::test]
async fn a_push_that_is_sent_again_is_announced_again() -> TestResult {
    let fake = Arc::new(Fake::default());
    let run = fake.open(fast()).await?;
    fake.publish.send_replace(true);
    fake.refuse_pushes
        .lock()
        .map_err(|_| "poisoned")?
        .push_back(Reason::Overloaded);
    run.push_weights(0, vec![Part::f32("w", &[1], &[1.0])?])
        .await?;
    assert_eq!(fake.announced(2).await?, [(0, 0, false); 2]);

    // The service tells the streams of one push apart, and pushes from one another.
    run.push_weights(1, vec![Part::f32("w", &[1], &[1.0])?])
        .await?;
    let pushed = fake.pushed.lock().map_err(|_| "poisoned")?;
    let starts = pushed
        .iter()
        .filter_map(|messages| match &messages[0].message {
            Some(Message::Start(start)) => Some((start.sender, start.attempt)),
            _ => None,
        });
    let [(first, 0), (again, 1), (next, 0)] = starts.collect::<Vec<_>>()[..] else {
        return Err("two attempts and one".into());
    };
    assert!(first == again && first != next && first != 0);
    Ok(())
}

#[tokio::test]
async fn a_loader_that_reads_ahead_says_what_it_holds() -> TestResult {
    let fake = Arc::new(Fake::default());
    let run = fake.open(fast()).await?;
    let config = BatchesConfig {
        read_ahead: 1,
        ..BatchesConfig::default()
    };
    let mut batches = run.batches(config)?;
    batches.next().await.ok_or("a batch")??;
    assert_eq!(fake.asked()[0].held_steps, 1);
    Ok(())
}

#[tokio::test]
async fn a_rewind_moves_the_handle_to_the_new_generation() -> TestResult {
    let fake = Arc::new(Fake::default());
    let run = fake.open(fast()).await?;
    assert_eq!(run.rewind(0, RewindMode::Reselect).await?, 2);
    run.clone().select(0, 0, 1, Intent::Need).await?;
    assert_eq!(fake.asked()[0].generation, 2);
    let error = run.receipt(9, None).await.expect_err("not committed");
    assert_eq!(
        (error.reason(), error.metadata()["step"].as_str()),
        (Some(Reason::StepNotCommitted), "9")
    );
    Ok(())
}

#[tokio::test]
async fn a_receipt_is_put_together_from_its_pages() -> TestResult {
    let fake = Arc::new(Fake::default());
    let run = fake.open(fast()).await?;
    let receipt = run.receipt(0, None).await?;
    assert_eq!(
        receipt.summary.map(|summary| summary.generation),
        Some(7),
        "all of one generation"
    );
    assert_eq!(
        receipt
            .chosen
            .iter()
            .map(|row| row.position)
            .collect::<Vec<_>>(),
        [0, 1]
    );
    assert_eq!(
        receipt
            .bad_rows
            .iter()
            .map(|row| row.position)
            .collect::<Vec<_>>(),
        [2]
    );
    assert!(
        run.receipt(1, None).await.is_err(),
        "pages that lead nowhere end"
    );
    Ok(())
}

#[tokio::test]
async fn other_weights_for_a_step_that_is_published_are_noticed() -> TestResult {
    let fake = Arc::new(Fake::default());
    fake.publish.send_replace(true);
    *fake.published_digest.lock().map_err(|_| "poisoned")? = "of other weights".to_owned();
    let run = fake.open(fast()).await?;
    let parts = || Part::f32("w", &[2], &[1.0, 2.0]).into_iter().collect();
    run.push_weights(0, parts()).await?;
    assert_eq!(
        run.dropped_push(),
        None,
        "no step was committed when the run was opened"
    );
    // One rank's parts say nothing of the whole.
    run.push(Push {
        expected_parts: 2,
        ..Push::whole(0, parts())
    })
    .await?;
    assert_eq!(run.dropped_push(), None);
    run.push_weights(0, parts()).await?;
    run.push_weights(-1, parts()).await?;
    assert_eq!(run.dropped_push(), Some(0));
    Ok(())
}

#[tokio::test]
async fn digests_come_in_pages_of_one_version() -> TestResult {
    let fake = Arc::new(Fake::default());
    let run = fake.open(fast()).await?;
    let (version, tensors) = run.weights_digests(None).await?;
    let names: Vec<_> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!((version.version, names), (7, vec!["7/0", "7/1", "7/2"]));
    Ok(())
}

#[tokio::test]
async fn a_run_is_closed_by_its_id() -> TestResult {
    let fake = Arc::new(Fake::default());
    let client = Client::connect(format!("http://{}", fake.serve().await?)).await?;
    client.close_run("finished").await?;
    client
        .open_run("run", RunSpec::default())
        .await?
        .close_run()
        .await?;
    assert_eq!(fake.closed(), ["finished", "run"]);
    Ok(())
}
