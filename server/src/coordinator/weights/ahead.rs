//! Writes the file of a push while its parts arrive, so that little is left after the last one.
//!
//! A snapshot's header says where each tensor lies, and only the last part tells which tensors
//! there are. But the pushes of a run are alike. So a push is expected to be like the last one
//! ([`Layout`]): a tensor that is whole is checked, written to its place in a draft, and hashed.
//! The draft is used only if the push turns out to be what was expected. What was not expected, a
//! part that is sent again, values that are not finite, and a disk that is full end it; the push is
//! then written once it is whole, as is the first one that a process takes of a run, and what is
//! wrong is told there.
use super::{
    Inner, assemble::Tensor, part::Part, push::Push, snapshots::SNAPSHOTS, staging::Staged,
};
use crate::{
    blocking::blocking,
    error::{Error, Result},
    pushed::Pushed,
    storage::{Draft, FLUSHED_WITHIN, Location},
};
use bytes::Bytes;
use safetensors::Dtype;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_util::task::AbortOnDropHandle;

/// Smaller files are written in less time than it takes to plan ahead.
const AHEAD_FROM: u64 = 8 << 20;
/// Tensors that are written together, at most.
const TOGETHER_MAX: usize = 64;

/// Where the tensors of a push lie in its file.
#[derive(Debug)]
pub(super) struct Layout {
    header: Bytes,
    dtypes: BTreeMap<String, Dtype>,
    places: HashMap<String, Place>,
    bytes: u64,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    /// In the file's order.
    number: usize,
    at: u64,
}

impl Layout {
    pub(super) fn of(pushed: &Pushed) -> Self {
        let mut bytes = pushed.header.len() as u64;
        let (mut dtypes, mut places) = (BTreeMap::new(), HashMap::new());
        for (number, tensor) in pushed.tensors.iter().enumerate() {
            let place = Place { number, at: bytes };
            bytes += tensor.bytes.len() as u64;
            dtypes.insert(tensor.name.clone(), tensor.dtype);
            places.insert(tensor.name.clone(), place);
        }
        Self {
            header: pushed.header.clone(),
            dtypes,
            places,
            bytes,
        }
    }
}

/// A push that is written while it arrives. If it is dropped, what was written is removed.
#[derive(Debug)]
pub(super) struct Ahead {
    layout: Arc<Layout>,
    /// Tensors that were handed on.
    whole: BTreeSet<String>,
    tensors: mpsc::UnboundedSender<(Place, Tensor)>,
    task: AbortOnDropHandle<Option<Written>>,
}

/// A file that has all tensors of a layout.
#[derive(Debug)]
pub(super) struct Written {
    pub draft: Draft,
    pub known: Known,
}

/// What is known of a push that was written while it arrived: its values are finite, and its file
/// has this digest.
#[derive(Debug, Clone)]
pub(super) struct Known {
    layout: Arc<Layout>,
    /// BLAKE3, in hex.
    pub digest: String,
}

impl Known {
    /// Returns whether it is of a push that has these tensors. Their shapes are told by
    /// [`Known::has_header`].
    pub(super) fn is_of(&self, dtypes: &BTreeMap<String, Dtype>) -> bool {
        self.layout.dtypes == *dtypes
    }

    /// Returns whether its file begins with `header`.
    pub(super) fn has_header(&self, header: &Bytes) -> bool {
        self.layout.header == *header
    }
}

impl Ahead {
    fn begin(run: Location, layout: Arc<Layout>) -> Self {
        // Not bounded: what is handed on lies in the push's memory already, and stays there.
        let (tensors, arrived) = mpsc::unbounded_channel();
        let task = tokio::spawn(write(run, layout.clone(), arrived));
        Self {
            layout,
            whole: BTreeSet::new(),
            tensors,
            task: AbortOnDropHandle::new(task),
        }
    }

    fn expects(&self, name: &str, dtype: Dtype) -> bool {
        self.layout.dtypes.get(name) == Some(&dtype)
    }

    /// Returns the file once all that was handed on is written; `None` if it is not that of a whole
    /// push, or the disk takes too long: the push is then written once more, which has a deadline.
    pub(super) async fn finish(self) -> Option<Written> {
        let Self { tensors, task, .. } = self;
        drop(tensors);
        let Ok(written) = timeout(FLUSHED_WITHIN, task).await else {
            tracing::warn!("a push was not written within {FLUSHED_WITHIN:?} as it arrived");
            return None;
        };
        written.ok().flatten()
    }
}

impl Inner {
    /// Has a push that begins written while it arrives, if it can be. A push that builds on another
    /// version is not: most of its tensors do not arrive.
    pub(super) fn begin_ahead(&self, mut push: Push) -> Push {
        let layout = self.layout.lock().expect("no panic while held").clone();
        let layout = layout.filter(|layout| layout.bytes >= AHEAD_FROM);
        if let (Some(layout), Some(staged), None) = (layout, &mut push.staged, push.base)
            && self.run.takes_drafts()
        {
            staged.ahead = Some(Ahead::begin(self.run.clone(), layout));
        }
        push
    }

    /// Expects the next push to be like one that was published.
    pub(super) fn expect(&self, layout: Layout) {
        *self.layout.lock().expect("no panic while held") = Some(Arc::new(layout));
    }
}

impl Staged {
    /// Returns the dtype of each tensor of which there is a part.
    pub(super) fn dtypes(&self) -> BTreeMap<String, Dtype> {
        let first = |(name, parts): (&String, &BTreeMap<u64, Part>)| {
            Some((name.clone(), parts.values().next()?.dtype))
        };
        self.tensors.iter().filter_map(first).collect()
    }

    /// Ends what is written ahead if a part was not expected.
    pub(super) fn expect(&mut self, name: &str, dtype: Dtype) {
        let is_expected = |ahead: &Ahead| ahead.expects(name, dtype);
        self.ahead = self.ahead.take().filter(is_expected);
    }

    /// Hands a tensor on to be written, if it has come as a whole.
    pub(super) fn hand_on(&mut self, name: &str) {
        let Some(ahead) = &mut self.ahead else {
            return;
        };
        let (Some(shape), Some(parts)) = (self.shape.tensors.get(name), self.tensors.get(name))
        else {
            return;
        };
        let have: u64 = parts.values().map(Part::elements).sum();
        let is_whole = have == shape.iter().product::<u64>() && parts.values().all(Part::is_here);
        let place = ahead.layout.places.get(name).copied();
        let place = place.filter(|_| is_whole);
        if let Some(place) = place
            && ahead.whole.insert(name.to_owned())
        {
            let tensor = Tensor {
                shape: shape.iter().map(|&n| n as usize).collect(),
                parts: parts.values().cloned().collect(),
            };
            // If the task has ended, the push is written once it is whole.
            drop(ahead.tensors.send((place, tensor)));
        }
    }

    /// Ends what is written ahead if a tensor was handed on of which a part is gone.
    pub(super) fn take_back(&mut self, name: &str) {
        let is_untouched = |ahead: &Ahead| !ahead.whole.contains(name);
        self.ahead = self.ahead.take().filter(is_untouched);
    }
}

/// Writes tensors as they come, until no more can; `None` if they are not those of the layout.
async fn write(
    run: Location,
    layout: Arc<Layout>,
    mut arrived: mpsc::UnboundedReceiver<(Place, Tensor)>,
) -> Option<Written> {
    let (mut writing, mut tensors) = (None, Vec::new());
    while arrived.recv_many(&mut tensors, TOGETHER_MAX).await > 0 {
        let (run, layout) = (run.clone(), layout.clone());
        let (begun, tensors) = (writing.take(), std::mem::take(&mut tensors));
        let work = blocking("writing a push while it arrives", move || {
            let mut writing = match begun {
                Some(writing) => writing,
                None => Writing::begin(&run, layout)?,
            };
            for (place, tensor) in tensors {
                writing.add(place, tensor)?;
            }
            Ok(writing)
        });
        match work.await {
            Ok(more) => writing = Some(more),
            Err(error) => {
                let error = error.chain();
                tracing::debug!(error, "a push is written only when it is whole");
                return None;
            }
        }
    }
    writing?.end()
}

/// A draft that is being written.
struct Writing {
    draft: Draft,
    layout: Arc<Layout>,
    hasher: blake3::Hasher,
    /// The tensor up to which the file is hashed, in the file's order.
    next: usize,
    /// The pieces of tensors that lie behind it.
    unhashed: BTreeMap<usize, Vec<Bytes>>,
}

impl Writing {
    fn begin(run: &Location, layout: Arc<Layout>) -> Result<Self> {
        let draft = run.draft(SNAPSHOTS)?;
        draft.write_at(0, &layout.header)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&layout.header);
        Ok(Self {
            draft,
            layout,
            hasher,
            next: 0,
            unhashed: BTreeMap::new(),
        })
    }

    fn add(&mut self, place: Place, tensor: Tensor) -> Result<()> {
        if let Some(value) = tensor.not_finite() {
            return Err(Error::internal(format!("a tensor holds {value}")));
        }
        // Kept as pieces: those of ranks that hold rows of the tensor are never joined here.
        let pieces = tensor.pieces();
        let mut at = place.at;
        for piece in &pieces {
            self.draft.write_at(at, piece)?;
            at += piece.len() as u64;
        }
        self.unhashed.insert(place.number, pieces);
        while let Some(pieces) = self.unhashed.remove(&self.next) {
            for piece in pieces {
                self.hasher.update(&piece);
            }
            self.next += 1;
        }
        Ok(())
    }

    fn end(self) -> Option<Written> {
        (self.next == self.layout.places.len()).then(|| Written {
            known: Known {
                digest: self.hasher.finalize().to_hex().to_string(),
                layout: self.layout,
            },
            draft: self.draft,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{ModelShape, assemble::join},
        *,
    };

    /// A push of one tensor of six elements.
    fn staged(shape: [u64; 2]) -> Staged {
        let model = ModelShape {
            tensors: [("t".to_owned(), shape.to_vec())].into(),
            optional: BTreeSet::new(),
            logit_scale: 1.0,
            logit_bias: None,
        };
        let part = Part {
            dtype: Dtype::F32,
            start: vec![0; 2],
            extent: shape.to_vec(),
            bytes: vec![0_u8; 24].into(),
        };
        let mut staged = Staged::new(Arc::new(model), 0, 1 << 30);
        let parts = BTreeMap::from([(0, part)]);
        staged.tensors.insert("t".to_owned(), parts);
        staged
    }

    #[test]
    fn a_known_digest_counts_only_for_a_file_with_the_same_header() {
        let written = join(staged([2, 3]), None).unwrap();
        let known = Known {
            layout: Arc::new(Layout::of(&written)),
            digest: "known".to_owned(),
        };
        let same = join(staged([2, 3]), Some(known.clone())).unwrap();
        assert_eq!(same.digest, "known");
        let other = join(staged([3, 2]), Some(known)).unwrap();
        let anew = join(staged([3, 2]), None).unwrap();
        assert_eq!(other.digest, anew.digest);
    }
}
