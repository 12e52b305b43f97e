//! Tickets: permissions to fetch rows from a worker. The coordinator signs them, the worker checks
//! them.
use crate::error::{Error, Result};
use bytes::Bytes;
use hmac::{Hmac, Mac};
use prost::Message;
use sha2::Sha256;
use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use superbatch_proto::v1::{Reason, TicketClaims};

const KEY_BYTES: usize = 32;
const MAC_BYTES: usize = 32;

/// The key that a worker makes at its start and shares with its coordinator.
#[derive(Clone)]
pub struct TicketKey([u8; KEY_BYTES]);

impl fmt::Debug for TicketKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TicketKey(hidden)")
    }
}

impl TicketKey {
    /// Makes a key by chance.
    pub(crate) fn random() -> Self {
        Self(rand::random())
    }

    /// # Errors
    /// `InvalidArgument` of field `ticket_key` unless `key` has 32 bytes.
    pub(crate) fn from_bytes(key: &[u8]) -> Result<Self> {
        let wrong = |_| {
            let message = format!("ticket_key has {} bytes; give {KEY_BYTES}", key.len());
            Error::invalid("ticket_key", message)
        };
        key.try_into().map(Self).map_err(wrong)
    }

    pub(crate) fn to_bytes(&self) -> Bytes {
        Bytes::copy_from_slice(&self.0)
    }

    /// Returns a ticket for what `claims` say.
    pub(crate) fn sign(&self, claims: &TicketClaims) -> Bytes {
        let mut ticket = claims.encode_to_vec();
        let mac = self.mac(&ticket).finalize().into_bytes();
        ticket.extend_from_slice(&mac);
        ticket.into()
    }

    /// Returns what a ticket says.
    ///
    /// # Errors
    /// `TicketRefused`, with `why`: `damaged`, `forged` or `expired`. Only tickets with a true
    /// signature are decoded.
    pub(crate) fn open(&self, ticket: &[u8], now: SystemTime) -> Result<TicketClaims> {
        let cut = ticket
            .len()
            .checked_sub(MAC_BYTES)
            .ok_or_else(|| refused("damaged", "it is too short to be one"))?;
        let (claims, mac) = ticket.split_at(cut);
        // Compared in constant time.
        self.mac(claims).verify_slice(mac).map_err(|_| {
            refused(
                "forged",
                "it was not signed for this worker since it started",
            )
        })?;
        let claims = TicketClaims::decode(claims)
            .map_err(|e| refused("damaged", "it cannot be decoded").because(e))?;
        if unix_ms(now) > claims.expires_unix_ms {
            let late = unix_ms(now) - claims.expires_unix_ms;
            let what = format!("it expired {} s ago", late.div_ceil(1000));
            return Err(refused("expired", &what));
        }
        Ok(claims)
    }

    fn mac(&self, claims: &[u8]) -> Hmac<Sha256> {
        let mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        mac.chain_update(claims)
    }
}

fn refused(why: &str, what: &str) -> Error {
    let message = format!("the ticket is refused: {what}; ask the coordinator for the step again");
    Error::new(Reason::TicketRefused, message).with("why", why)
}

/// Returns when a ticket made at `now` expires.
pub(crate) fn expiry(now: SystemTime, life: Duration) -> u64 {
    unix_ms(now).saturating_add(life.as_millis() as u64)
}

fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn claims(expires_unix_ms: u64) -> TicketClaims {
        TicketClaims {
            run_id: "run".into(),
            step: 7,
            rank: 1,
            world_size: 2,
            kept: 3,
            rows: vec![5, 0, 2],
            expires_unix_ms,
            ..Default::default()
        }
    }

    fn why<T>(result: Result<T>) -> Option<String> {
        result.err()?.value("why").map(str::to_owned)
    }

    #[test]
    fn a_ticket_holds_until_it_expires() {
        let (key, now) = (TicketKey::random(), SystemTime::now());
        let life = Duration::from_secs(60);
        let given = claims(expiry(now, life));
        let ticket = key.sign(&given);
        assert_eq!(key.open(&ticket, now + life).unwrap(), given);
        let late = key.open(&ticket, now + life + Duration::from_secs(1));
        assert_eq!(why(late).as_deref(), Some("expired"));
    }

    #[test]
    fn a_key_is_not_printed_and_has_its_length() {
        let key = TicketKey::from_bytes(&[7; 32]).unwrap();
        assert_eq!(format!("{key:?}"), "TicketKey(hidden)");
        assert_eq!(TicketKey::from_bytes(&key.to_bytes()).unwrap().0, [7; 32]);
        for wrong in [0, 31, 33] {
            let error = TicketKey::from_bytes(&vec![7; wrong]).unwrap_err();
            assert_eq!(error.value("field"), Some("ticket_key"));
        }
    }

    proptest! {
        #[test]
        fn any_change_of_a_ticket_is_found(
            at in 0_usize..200,
            bit in 0_u32..8,
            cut in 0_usize..200,
        ) {
            let (key, now) = (TicketKey::random(), SystemTime::now());
            let ticket = key.sign(&claims(u64::MAX));
            let mut changed = ticket.to_vec();
            let at = at % changed.len();
            changed[at] ^= 1 << bit;
            let told = why(key.open(&changed, now));
            prop_assert_eq!(told.as_deref(), Some("forged"));
            let cut = cut % ticket.len();
            prop_assert!(key.open(&ticket[..cut], now).is_err());
            prop_assert!(TicketKey::random().open(&ticket, now).is_err());
        }
    }
}
