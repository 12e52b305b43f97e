//! Chosen rows: those that are in hand here, and those that stay on the workers that read them.
use super::table::Table;
use crate::{
    coordinator::workers::{
        replies::{Replies, unsound},
        worker::Worker,
    },
    error::Result,
};
use std::{any::Any, fmt, sync::Mutex};
use superbatch_proto::v1::KeptRows;

const HASH_BYTES: usize = 16;

/// The data columns of chosen rows, in the order of the draw.
#[derive(Debug)]
pub enum Data {
    Here(Table),
    OnWorkers(OnWorkers),
    /// Some of them are held nowhere: they must be read again.
    Nowhere,
}

/// Chosen rows that workers hold for trainers.
#[derive(Debug, Default)]
pub struct OnWorkers {
    pub parts: Vec<Part>,
    /// For each row, its part and its row there.
    pub places: Vec<(u32, u32)>,
}

/// Rows that one worker holds for as long as this lives.
pub struct Part {
    pub worker: Worker,
    /// By this number tickets name them.
    pub id: u64,
    /// What they take of the worker's memory.
    pub bytes: u64,
    /// The call that keeps them.
    _open: Mutex<Box<dyn Any + Send>>,
}

/// A worker's answer to rows that it was to hold.
#[derive(Debug)]
pub struct Kept {
    /// `None` if it has no room for them.
    pub part: Option<Part>,
    pub hashes: Vec<Vec<u8>>,
}

impl fmt::Debug for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Part")
            .field("worker", &self.worker.address)
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Kept {
    /// Reads the answer of `worker` to `wanted` rows. `open` is the call, which stays open.
    ///
    /// # Errors
    /// `Internal` unless each row has a content hash; `MessageTooLarge` if they take more than a
    /// worker may send.
    pub fn new(
        worker: &Worker,
        answer: &KeptRows,
        wanted: usize,
        replies: Replies,
        open: impl Any + Send,
    ) -> Result<Self> {
        let hashes = &answer.content_hashes;
        if hashes.len() != wanted * HASH_BYTES {
            let bytes = hashes.len();
            return Err(unsound(format_args!(
                "{bytes} bytes of content hashes of {wanted} rows"
            )));
        }
        replies.check_rows_bytes(answer.bytes)?;
        let hashes = hashes.chunks(HASH_BYTES).map(<[u8]>::to_vec).collect();
        // A worker without a key serves no tickets, whatever it says.
        let serves = answer.id != 0 && worker.ticket_key.is_some();
        let part = serves.then(|| Part {
            worker: worker.clone(),
            id: answer.id,
            bytes: answer.bytes,
            _open: Mutex::new(Box::new(open)),
        });
        Ok(Self { part, hashes })
    }
}

impl Data {
    /// Appends the rows of `other`. Rows of which some are here and some on workers are nowhere:
    /// a batch comes one way.
    ///
    /// # Errors
    /// `Internal` if the schemas differ.
    pub fn append(&mut self, other: Self) -> Result<()> {
        match (&mut *self, other) {
            (Self::Here(rows), Self::Here(more)) => rows.append(more)?,
            (Self::OnWorkers(rows), Self::OnWorkers(more)) => {
                let first = rows.parts.len() as u32;
                let places = more.places.into_iter();
                rows.places
                    .extend(places.map(|(part, row)| (first + part, row)));
                rows.parts.extend(more.parts);
            }
            _ => *self = Self::Nowhere,
        }
        Ok(())
    }
}

/// Joins what workers hold, in the order of `places`: for each row of the result its number among
/// the rows of all workers, one after the other.
pub fn joined(answers: Vec<Kept>, places: &[u32]) -> (Data, Vec<Vec<u8>>) {
    let (mut flat, mut hashes, mut parts) = (Vec::new(), Vec::new(), Vec::new());
    for (number, kept) in (0_u32..).zip(answers) {
        flat.extend((0..kept.hashes.len() as u32).map(|row| (number, row)));
        hashes.extend(kept.hashes);
        parts.push(kept.part);
    }
    let of = |place: &u32| hashes[*place as usize].clone();
    let hashes = places.iter().map(of).collect();
    let places = places.iter().map(|place| flat[*place as usize]).collect();
    let data = match parts.into_iter().collect::<Option<Vec<_>>>() {
        Some(parts) => Data::OnWorkers(OnWorkers { parts, places }),
        None => Data::Nowhere,
    };
    (data, hashes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{coordinator::workers::worker::tests::unreachable, ticket::TicketKey};
    use superbatch_proto::v1::Reason;

    fn worker(serves: bool) -> Worker {
        unreachable(serves.then(TicketKey::random))
    }

    fn kept(id: u64, hashes: &[u8]) -> Kept {
        let bytes = hashes.iter().flat_map(|hash| [*hash; HASH_BYTES]);
        let answer = KeptRows {
            id,
            content_hashes: bytes.collect::<Vec<_>>().into(),
            bytes: 0,
        };
        Kept::new(&worker(true), &answer, hashes.len(), Replies::default(), ()).unwrap()
    }

    #[tokio::test]
    async fn rows_on_workers_keep_the_order_of_the_draw() {
        let (mut data, hashes) = joined(vec![kept(7, &[1, 2]), kept(8, &[3])], &[2, 0, 1]);
        assert_eq!(hashes, [[3; 16], [1; 16], [2; 16]]);
        let (more, _) = joined(vec![kept(9, &[4])], &[0]);
        data.append(more).unwrap();
        let Data::OnWorkers(rows) = &data else {
            panic!("{data:?}")
        };
        assert_eq!(rows.places, [(1, 0), (0, 0), (0, 1), (2, 0)]);
        let ids: Vec<u64> = rows.parts.iter().map(|part| part.id).collect();
        assert_eq!(ids, [7, 8, 9]);
    }

    #[tokio::test]
    async fn a_batch_comes_one_way() {
        let (mut data, hashes) = joined(vec![kept(7, &[1]), kept(0, &[2])], &[1, 0]);
        assert!(matches!(data, Data::Nowhere), "one of them has no room");
        assert_eq!(hashes, [[2; 16], [1; 16]], "the receipt needs them still");
        data.append(joined(vec![kept(7, &[1])], &[0]).0).unwrap();
        assert!(matches!(data, Data::Nowhere));
    }

    #[tokio::test]
    async fn rows_beyond_the_bound_are_not_kept() {
        let replies = Replies {
            rows_bytes_max: 100,
            ..Default::default()
        };
        let of = |bytes| {
            let answer = KeptRows {
                id: 3,
                content_hashes: vec![0; HASH_BYTES].into(),
                bytes,
            };
            Kept::new(&worker(true), &answer, 1, replies, ())
        };
        assert_eq!(of(100).unwrap().part.unwrap().bytes, 100);
        assert_eq!(of(101).unwrap_err().reason(), Reason::MessageTooLarge);
    }

    #[tokio::test]
    async fn an_answer_of_another_size_is_unsound() {
        let answer = KeptRows {
            id: 3,
            content_hashes: vec![0; 31].into(),
            bytes: 0,
        };
        assert!(Kept::new(&worker(true), &answer, 2, Replies::default(), ()).is_err());
        let answer = KeptRows {
            content_hashes: vec![0; 32].into(),
            ..answer
        };
        let kept = Kept::new(&worker(false), &answer, 2, Replies::default(), ()).unwrap();
        assert!(kept.part.is_none(), "it has no key");
    }
}
