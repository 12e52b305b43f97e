//! Limits how often the calls of one caller may be refused.
use std::{
    collections::HashMap,
    net::IpAddr,
    sync::Mutex,
    time::{Duration, Instant},
};

/// Failures of one caller within [`WINDOW`] that are answered with their cause. Later ones are
/// answered with "wait", which limits guessing and the audit log's growth.
pub(super) const FAILURES_MAX: u32 = 20;
const WINDOW: Duration = Duration::from_secs(60);
/// Callers that are remembered. Beyond them the oldest is forgotten, so that many addresses (an
/// IPv6 network) cannot fill the memory.
const CALLERS_MAX: usize = 4096;

/// A caller: its address, and the name of its token if that is valid. Callers with a valid token
/// are counted apart. Otherwise one of them that asks in a loop would hide the cause of a refusal
/// from all others behind the same address.
type Failing = (Option<IpAddr>, Option<String>);

/// The answer to a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Answer with the cause.
    Explained,
    /// Answer "wait". `first` marks the first one in this window, which alone is logged.
    Limited { first: bool },
}

#[derive(Debug, Default)]
pub(super) struct Failures(Mutex<HashMap<Failing, (u32, Instant)>>);

impl Failures {
    /// Notes a failure at `now` of the caller at `address`, whose token is called `who`.
    pub(super) fn record(
        &self,
        address: Option<IpAddr>,
        who: Option<&str>,
        now: Instant,
    ) -> Verdict {
        let mut known = self.0.lock().expect("no panic while held");
        let caller = (address, who.map(str::to_owned));
        if known.len() >= CALLERS_MAX && !known.contains_key(&caller) {
            known.retain(|_, (_, since)| now.duration_since(*since) < WINDOW);
            let oldest = known.iter().min_by_key(|(_, (_, since))| *since);
            if let Some(oldest) = oldest.map(|(caller, _)| caller.clone())
                && known.len() >= CALLERS_MAX
            {
                known.remove(&oldest);
            }
        }
        let (count, since) = known.entry(caller).or_insert((0, now));
        if now.duration_since(*since) >= WINDOW {
            (*count, *since) = (0, now);
        }
        *count = count.saturating_add(1);
        match *count {
            count if count <= FAILURES_MAX => Verdict::Explained,
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
    fn a_caller_is_limited_for_a_minute_and_no_other_with_it() {
        let (failures, start) = (Failures::default(), Instant::now());
        let [bad, good]: [Option<IpAddr>; 2] =
            [[10, 0, 0, 1], [10, 0, 0, 2]].map(|octets| Some(octets.into()));
        for _ in 0..FAILURES_MAX {
            assert_eq!(failures.record(bad, None, start), Verdict::Explained);
        }
        for first in [true, false] {
            let limited = Verdict::Limited { first };
            assert_eq!(failures.record(bad, None, start), limited);
        }
        assert_eq!(failures.record(good, None, start), Verdict::Explained);
        assert_eq!(
            failures.record(bad, Some("team"), start),
            Verdict::Explained
        );
        assert_eq!(
            failures.record(bad, None, start + WINDOW),
            Verdict::Explained
        );
    }

    #[test]
    fn many_addresses_take_bounded_memory() {
        let (failures, start) = (Failures::default(), Instant::now());
        for n in 0..2 * CALLERS_MAX as u32 {
            failures.record(Some(IpAddr::from(n.to_be_bytes())), None, start);
        }
        assert_eq!(failures.0.lock().unwrap().len(), CALLERS_MAX);
    }
}
