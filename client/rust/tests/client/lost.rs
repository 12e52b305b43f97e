//! Services that fall silent or go away.
use crate::fake::{Fake, TestResult, Way, fast, open_with, way_to};
use std::{sync::Arc, time::Duration};
use superbatch_client::{ConnectConfig, Error, Part, Retry, Run, v1::Intent};
use tokio::{sync::watch, time::timeout};

/// Far below what the client's keep-alive takes when it is not shortened.
const DEADLINE: Duration = Duration::from_secs(30);

fn a_second() -> Retry {
    Retry {
        attempts_max: 1000,
        elapsed_max: Duration::from_secs(1),
        ..fast()
    }
}

/// A run whose service is then reached as `way` says.
async fn lost(way: Way, retry: Retry) -> TestResult<(Run, String)> {
    let (change, changed) = watch::channel(Way::Open);
    let address = way_to(Arc::new(Fake::default()).serve().await?, changed).await?;
    let run = open_with(
        address,
        ConnectConfig {
            retry,
            ..ConnectConfig::default()
        },
    )
    .await?;
    change.send_replace(way);
    if way == Way::Gone {
        change.closed().await;
    }
    tokio::spawn(async move { change.closed().await });
    Ok((run, format!("http://{address}")))
}

#[tokio::test]
async fn a_service_that_stands_still_is_given_up_in_time_and_the_time_is_true() -> TestResult {
    let (run, uri) = lost(Way::Silent, a_second()).await?;
    let began = std::time::Instant::now();
    let error = timeout(DEADLINE, run.select(0, 0, 1, Intent::Need))
        .await?
        .expect_err("nothing moves");
    let took = began.elapsed();
    let Error::GaveUp {
        attempts: 1,
        elapsed,
        last,
    } = &error
    else {
        return Err(error.to_string().into());
    };
    assert!(
        matches!(&**last, Error::Broken { uri: at, .. } if *at == uri),
        "{error}"
    );
    assert!(
        *elapsed <= took && took <= 2 * *elapsed,
        "it took {took:?}: {error}"
    );
    Ok(())
}

#[tokio::test]
async fn after_a_break_no_attempt_is_made_at_a_silent_service() -> TestResult {
    let (run, uri) = lost(Way::CutAndSilent, a_second()).await?;
    let error = timeout(DEADLINE, run.select(0, 0, 1, Intent::Need))
        .await?
        .expect_err("nothing moves");
    let Error::GaveUp {
        attempts: 1, last, ..
    } = &error
    else {
        return Err(error.to_string().into());
    };
    assert!(
        matches!(&**last, Error::Broken { uri: at, .. } if *at == uri),
        "{error}"
    );
    Ok(())
}

#[tokio::test]
async fn a_service_that_is_gone_is_told_with_its_address() -> TestResult {
    let (run, uri) = lost(
        Way::Gone,
        Retry {
            attempts_max: 3,
            ..fast()
        },
    )
    .await?;
    let error = timeout(DEADLINE, run.get_run())
        .await?
        .expect_err("nobody listens");
    assert_eq!(error.reason_name(), "UNAVAILABLE");
    let Error::GaveUp {
        attempts: 3, last, ..
    } = &error
    else {
        return Err(error.to_string().into());
    };
    assert!(
        matches!(&**last, Error::Broken { uri: at, .. } if *at == uri),
        "{error}"
    );
    // Calls that are not repeated tell it as well.
    let error = timeout(DEADLINE, run.append_phases(Vec::new()))
        .await?
        .expect_err("nobody listens");
    assert!(
        matches!(&error, Error::Broken { uri: at, .. } if *at == uri),
        "{error}"
    );
    Ok(())
}

#[tokio::test]
async fn a_service_that_is_there_may_take_longer_than_silence_may_last() -> TestResult {
    let fake = Arc::new(Fake::default());
    let keep_alive = Duration::from_millis(100);
    let retry = Retry {
        elapsed_max: Duration::ZERO,
        ..fast()
    };
    let config = ConnectConfig {
        keep_alive,
        retry,
        ..ConnectConfig::default()
    };
    let run = open_with(fake.serve().await?, config).await?;
    let push = run.push_weights(0, vec![Part::f32("w", &[1], &[1.0])?]);
    tokio::pin!(push);
    assert!(
        timeout(10 * keep_alive, &mut push).await.is_err(),
        "it is not answered yet"
    );
    fake.publish.send_replace(true);
    assert_eq!(timeout(DEADLINE, push).await??.step, 0);
    Ok(())
}
