//! Checks of the durations that an operator sets.
use super::Config;
use crate::error::{Error, Result};

/// Durations beyond this are refused, in seconds: about 30 years.
const SECONDS_MAX: f64 = 1e9;

/// # Errors
/// `InvalidArgument`, with the `field` that is no duration.
pub(super) fn check(config: &Config) -> Result<()> {
    let (c, storage) = (&config.coordinator, &config.storage);
    let seconds = [
        ("coordinator.grace_seconds", c.grace_seconds),
        ("coordinator.need_deadline_seconds", c.need_deadline_seconds),
        ("coordinator.ticket_seconds", c.ticket_seconds),
        ("coordinator.lease_seconds", c.lease_seconds),
        (
            "coordinator.worker_silence_seconds",
            c.worker_silence_seconds,
        ),
        ("coordinator.push_deadline_seconds", c.push_deadline_seconds),
        (
            "storage.answer_timeout_seconds",
            storage.answer_timeout_seconds,
        ),
        (
            "storage.stall_timeout_seconds",
            storage.stall_timeout_seconds,
        ),
    ];
    let sound = |seconds: f64| seconds > 0.0 && seconds <= SECONDS_MAX;
    match seconds.into_iter().find(|(_, value)| !sound(*value)) {
        Some((field, value)) => Err(Error::invalid(
            field,
            format!("{field} is {value}; give seconds above 0, at most {SECONDS_MAX}"),
        )),
        None => Ok(()),
    }
}
