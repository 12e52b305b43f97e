//! Limits how often calls from one address may fail for their token.
use std::{
    collections::HashMap,
    net::IpAddr,
    sync::Mutex,
    time::{Duration, Instant},
};

/// Failures from one address within [`WINDOW`] that are answered with their cause. Later ones are
/// answered with "wait", which limits guessing and the audit log's growth.
const FAILURES_MAX: u32 = 20;
const WINDOW: Duration = Duration::from_secs(60);
/// Addresses that are remembered. Beyond them the oldest is forgotten, so that many addresses (an
/// IPv6 network) cannot fill the memory.
const ADDRESSES_MAX: usize = 4096;

/// The answer to a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Answer with the cause.
    Told,
    /// Answer "wait". `first` marks the first one in this window, which alone is logged.
    Limited { first: bool },
}

#[derive(Debug, Default)]
pub(super) struct Failures(Mutex<HashMap<IpAddr, (u32, Instant)>>);

impl Failures {
    /// Notes a failure of `address` at `now`.
    pub(super) fn record(&self, address: IpAddr, now: Instant) -> Verdict {
        let mut known = self.0.lock().expect("no panic while held");
        if known.len() >= ADDRESSES_MAX && !known.contains_key(&address) {
            known.retain(|_, (_, since)| now.duration_since(*since) < WINDOW);
            let oldest = known.iter().min_by_key(|(_, (_, since))| *since);
            if let Some(oldest) = oldest.map(|(address, _)| *address)
                && known.len() >= ADDRESSES_MAX
            {
                known.remove(&oldest);
            }
        }
        let (count, since) = known.entry(address).or_insert((0, now));
        if now.duration_since(*since) >= WINDOW {
            (*count, *since) = (0, now);
        }
        *count = count.saturating_add(1);
        match *count {
            count if count <= FAILURES_MAX => Verdict::Told,
            count => Verdict::Limited {
                first: count == FAILURES_MAX + 1,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_limited_for_a_minute_and_no_other_with_it() {
        let (failures, start) = (Failures::default(), Instant::now());
        let [bad, good]: [IpAddr; 2] = [[10, 0, 0, 1].into(), [10, 0, 0, 2].into()];
        for _ in 0..FAILURES_MAX {
            assert_eq!(failures.record(bad, start), Verdict::Told);
        }
        assert_eq!(
            failures.record(bad, start),
            Verdict::Limited { first: true }
        );
        assert_eq!(
            failures.record(bad, start),
            Verdict::Limited { first: false }
        );
        assert_eq!(failures.record(good, start), Verdict::Told);
        assert_eq!(failures.record(bad, start + WINDOW), Verdict::Told);
    }

    #[test]
    fn many_addresses_take_bounded_memory() {
        let (failures, start) = (Failures::default(), Instant::now());
        for n in 0..2 * ADDRESSES_MAX as u32 {
            failures.record(IpAddr::from(n.to_be_bytes()), start);
        }
        assert_eq!(failures.0.lock().unwrap().len(), ADDRESSES_MAX);
    }
}
