use super::{super::tests::rows, *};

/// A process that was stopped for minutes goes on with the rows that it had under way: only time in
/// which its decoders could run counts.
#[test]
fn the_time_of_a_stopped_process_does_not_count() {
    let deadline = Duration::from_secs(120);
    let shared = Arc::new(Shared::new(1, deadline));
    let one = |row: &Row| Err(RowFault::new(BadRowReason::ImageNull, row.row.to_string()));
    let call = Arc::new(Call::new(rows(1), one));
    shared.lock().queue.push_back(Queued {
        call: call.clone(),
        next: 0,
    });
    // This test stands in for the thread of the only seat.
    shared.lock().seats[0].thread = Some(7);
    assert_eq!(shared.next(0, 7).unwrap().1, 0);

    let mut now = shared.lock().clock.looked + Duration::from_secs(600);
    shared.look(&mut shared.lock(), now);
    assert!(call.prepared[0].get().is_none(), "stopped for ten minutes");

    for _ in 0..LOOKS {
        now += shared.period();
        shared.look(&mut shared.lock(), now);
    }
    let fault = call.prepared[0].get().unwrap().as_ref().unwrap_err();
    assert!(fault.detail.contains("within 120 s"), "{}", fault.detail);

    // The thread comes back after all: its row stays bad, and its seat is another's.
    call.prepare(0);
    let kept = call.prepared[0].get().unwrap().as_ref().unwrap_err();
    assert_eq!(kept.detail, fault.detail);
    assert!(shared.next(0, 7).is_none());
    drop(Threads(shared));
}
