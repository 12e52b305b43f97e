//! The parts of one push in memory: which parts may be staged, and when the push is whole. No I/O:
//! if the push is written while it arrives, whole tensors are handed to [`Ahead`].
use super::{ModelShape, ahead::Ahead, names, part::Part};
use crate::{
    bounds::{PARTS_MAX, PARTS_OF_TENSOR_MAX, TENSOR_NAME_BYTES_MAX, check_bytes},
    error::{Error, Result},
};
use bytes::Bytes;
use safetensors::Dtype;
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};
use superbatch_proto::{
    Checksum,
    v1::{PartHeader, Reason, TensorDtype},
};

/// A place for a part that was announced by its header.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) stream: u64,
    /// The part's tensor; `None` if the part is thrown away because it is a buffer and no weight.
    tensor: Option<String>,
    pub(super) done: bool,
}

/// The parts of one push, of all its streams.
#[derive(Debug)]
pub struct Staged {
    pub(super) shape: Arc<ModelShape>,
    bytes_max: u64,
    /// Parts of the whole push; 0 if the end of its single stream says that it is whole.
    expected: u32,
    bytes: u64,
    pub(super) slots: HashMap<u64, Slot>,
    next_slot: u64,
    pub(super) tensors: BTreeMap<String, BTreeMap<u64, Part>>,
    /// What writes the push while it arrives; `None` if nothing does.
    pub(super) ahead: Option<Ahead>,
}

/// A part whose bytes are arriving.
pub struct Receiving {
    slot: u64,
    tensor: String,
    /// `None`: any number of bytes, which are thrown away.
    bytes_due: Option<usize>,
    bytes: Vec<u8>,
    /// `None`: the part needs none.
    checksum: Option<(Checksum, Bytes)>,
}

pub(super) fn refused(tensor: &str, message: impl Into<String>) -> Error {
    Error::new(Reason::WeightsRefused, message).with("tensor", tensor)
}

impl Staged {
    pub fn new(shape: Arc<ModelShape>, expected: u32, bytes_max: u64) -> Self {
        let (slots, tensors) = (HashMap::new(), BTreeMap::new());
        Self {
            shape,
            bytes_max,
            expected,
            bytes: 0,
            slots,
            next_slot: 0,
            tensors,
            ahead: None,
        }
    }

    /// Throws all parts away, for a push that is cut into `expected` other ones. Slots are numbered
    /// on, so that a part of before that arrives late finds none.
    pub fn begin_again(&mut self, expected: u32) {
        self.expected = expected;
        self.bytes = 0;
        self.slots.clear();
        self.tensors.clear();
        self.ahead = None;
    }

    pub fn expected(&self) -> u32 {
        self.expected
    }

    /// Reserves a place for a part that `stream` announces.
    ///
    /// # Errors
    /// `WeightsRefused` if the learner has no tensor of which it is a block, `PushConflict` if it
    /// overlaps another part, `MessageTooLarge` beyond the bytes of a push. All name the tensor.
    pub fn reserve(&mut self, stream: u64, header: PartHeader) -> Result<Receiving> {
        check_bytes("name", &header.name, TENSOR_NAME_BYTES_MAX)?;
        let header = self.as_the_learner(header);
        let name = header.name.clone();
        if self.expected > 0 && self.slots.len() >= self.expected as usize {
            return Err(refused(
                &name,
                format!(
                    "{name} is one part more than expected_parts ({}), which counts the parts of \
                    all ranks together",
                    self.expected
                ),
            ));
        }
        let parts = self.tensors.get(&name).map_or(0, BTreeMap::len);
        if self.slots.len() >= PARTS_MAX || parts >= PARTS_OF_TENSOR_MAX {
            let message = format!(
                "{name} is one part too many: a push has at most {PARTS_MAX} parts, and \
                {PARTS_OF_TENSOR_MAX} of one tensor"
            );
            return Err(Error::invalid("part", message).with("tensor", name));
        }
        let slot = self.next_slot;
        let mut receiving = Receiving {
            slot,
            tensor: name.clone(),
            bytes_due: None,
            bytes: Vec::new(),
            checksum: Some((Checksum::default(), header.xxh3.clone())),
        };
        let mut tensor = None;
        if !self.is_buffer(&name) {
            let part = self.check(header)?;
            let size = part.elements() * part.dtype.bitsize() as u64 / 8;
            let bytes = self.bytes.saturating_add(size);
            if bytes > self.bytes_max {
                let message = format!(
                    "with {name} the push exceeds coordinator.push_bytes_max ({}); raise it",
                    self.bytes_max
                );
                return Err(Error::new(Reason::MessageTooLarge, message).with("tensor", name));
            }
            // Counted when the header arrives, before any byte of the part: parts of several
            // streams arrive at the same time, and each alone may fit.
            self.bytes = bytes;
            receiving.bytes_due =
                Some(usize::try_from(size).map_err(|e| Error::internal("part size").because(e))?);
            // Under FSDP a rank whose shard is empty still sends a part. It is counted for
            // `expected_parts` but not kept: with thousands of ranks, comparing empty parts would
            // be most of the work.
            let parts = self.tensors.entry(name.clone()).or_default();
            if part.elements() > 0 || parts.is_empty() {
                let dtype = part.dtype;
                parts.insert(slot, part);
                self.expect(&name, dtype);
                tensor = Some(name);
            }
        }
        self.next_slot += 1;
        self.slots.insert(
            slot,
            Slot {
                stream,
                done: tensor.is_none(),
                tensor,
            },
        );
        Ok(receiving)
    }

    /// Returns the part with the learner's name and shape of its tensor: without the prefixes of
    /// wrappers, and with the learner's form of a scalar (`[]` or `[1]`).
    fn as_the_learner(&self, mut header: PartHeader) -> PartHeader {
        if let Some(name) = names::unwrapped(&header.name, &self.shape.tensors) {
            names::log_prefixes_once(&header.name, &name);
            header.name = name;
        }
        let own = self.shape.tensors.get(&header.name);
        if let Some(own) = own.filter(|own| own.len() < 2 && own.iter().product::<u64>() == 1) {
            let is_one =
                header.global_shape.iter().all(|n| *n == 1) && header.global_shape.len() < 2;
            if is_one && header.extent.iter().all(|n| *n == 1) {
                header.start = vec![0; own.len()];
                (header.extent, header.global_shape) = (own.clone(), own.clone());
            }
        }
        header
    }

    /// Returns whether a tensor is a buffer. Position ids are constants that some versions of
    /// transformers keep in the state dict.
    fn is_buffer(&self, name: &str) -> bool {
        let last = name.rsplit('.').next();
        last == Some("position_ids") && !self.shape.tensors.contains_key(name)
    }

    fn check(&self, header: PartHeader) -> Result<Part> {
        let PartHeader {
            name,
            global_shape,
            start,
            extent,
            ..
        } = &header;
        let Some(shape) = self.shape.tensors.get(name) else {
            let near = names::similar_names(name, &self.shape.tensors);
            return Err(refused(
                name,
                format!("{name} is no tensor of the learner, whose model folder names them{near}"),
            ));
        };
        if shape != global_shape {
            return Err(refused(
                name,
                format!("{name} has shape {global_shape:?}, and {shape:?} in the learner"),
            ));
        }
        let dtype = match header.dtype() {
            TensorDtype::F32 => Dtype::F32,
            TensorDtype::F16 => Dtype::F16,
            TensorDtype::Bf16 => Dtype::BF16,
            TensorDtype::Unspecified => {
                return Err(refused(name, format!("{name} must be f32, f16 or bf16")));
            }
        };
        let inside =
            |((s, e), n): ((&u64, &u64), &u64)| s.checked_add(*e).is_some_and(|end| end <= *n);
        let dimensions_agree = start.len() == shape.len() && extent.len() == shape.len();
        if !dimensions_agree || !start.iter().zip(extent).zip(shape).all(inside) {
            let message = format!(
                "a part of {name}, start {start:?} and extent {extent:?}, lies outside of {shape:?}"
            );
            return Err(refused(name, message));
        }
        let part = Part {
            dtype,
            start: start.clone(),
            extent: extent.clone(),
            bytes: Bytes::new(),
        };
        for other in self
            .tensors
            .get(name)
            .into_iter()
            .flat_map(BTreeMap::values)
        {
            if other.dtype != dtype {
                return Err(refused(
                    name,
                    format!("the parts of {name} differ in dtype"),
                ));
            }
            if other.overlaps(&part) {
                let message = format!(
                    "two parts of {name} overlap, at {start:?} and at {:?}",
                    other.start
                );
                return Err(Error::new(Reason::PushConflict, message).with("tensor", name));
            }
        }
        Ok(part)
    }

    /// Keeps a part that has arrived completely.
    ///
    /// # Errors
    /// `WeightsRefused`, naming its tensor, if bytes are missing or the checksum differs.
    pub fn add_received(&mut self, receiving: Receiving) -> Result<()> {
        let Receiving {
            slot,
            tensor,
            bytes_due,
            bytes,
            checksum,
        } = receiving;
        if let Some(due) = bytes_due {
            if bytes.len() != due {
                return Err(refused(
                    &tensor,
                    format!(
                        "a part of {tensor} ended after {} of {due} bytes",
                        bytes.len()
                    ),
                ));
            }
            let differs = |(sum, xxh3): (Checksum, Bytes)| sum.finish()[..] != xxh3[..];
            if checksum.is_some_and(differs) {
                return Err(refused(
                    &tensor,
                    format!("a part of {tensor} does not match its checksum; push it again"),
                ));
            }
        }
        // A missing slot was removed together with its stream.
        let Some(found) = self.slots.get_mut(&slot) else {
            return Ok(());
        };
        found.done = true;
        if let Some(part) = self
            .tensors
            .get_mut(&tensor)
            .and_then(|parts| parts.get_mut(&slot))
        {
            part.bytes = bytes.into();
            self.hand_on(&tensor);
        }
        Ok(())
    }

    /// Removes all parts of a stream that broke.
    pub fn drop_stream(&mut self, stream: u64) {
        let dropped: Vec<u64> = self
            .slots
            .iter()
            .filter(|(_, slot)| slot.stream == stream)
            .map(|(id, _)| *id)
            .collect();
        for id in dropped {
            let Some(tensor) = self.slots.remove(&id).and_then(|slot| slot.tensor) else {
                continue;
            };
            let parts = self.tensors.get_mut(&tensor);
            if let Some(part) = parts.and_then(|parts| parts.remove(&id)) {
                self.bytes -= part.elements() * part.dtype.bitsize() as u64 / 8;
            }
            self.take_back(&tensor);
        }
    }

    /// Returns whether all parts have arrived, given that no stream is still sending.
    pub fn is_whole(&self) -> bool {
        self.expected == 0 || self.arrived_parts() == self.expected as usize
    }

    fn arrived_parts(&self) -> usize {
        self.slots.values().filter(|slot| slot.done).count()
    }

    /// Returns the refusal of a push that did not become whole in time: the number of missing
    /// parts, the ranks that brought the others, and the first tensor.
    pub fn incomplete(&self, ranks: &str) -> Error {
        let missing = (self.expected as usize).saturating_sub(self.arrived_parts());
        let first = self.shape.tensors.iter().find(|(name, shape)| {
            if self.shape.optional.contains(*name) {
                return false;
            }
            let parts = self
                .tensors
                .get(*name)
                .into_iter()
                .flat_map(BTreeMap::values);
            parts
                .filter(|part| !part.bytes.is_empty())
                .map(Part::elements)
                .sum::<u64>()
                < shape.iter().product()
        });
        let (first, expected) = (first.map_or("", |(name, _)| name), self.expected);
        refused(
            first,
            format!(
                "{missing} of {expected} parts did not come within \
                 coordinator.push_deadline_seconds, only those of rank {ranks}: each rank that \
                 holds a part calls push_weights for the step (under FSDP, all ranks), and \
                 expected_parts counts the parts of all of them"
            ),
        )
    }
}

impl Receiving {
    /// Returns it as a part that this process reads itself: nothing on the way can change it.
    pub fn unchecked(mut self) -> Self {
        self.checksum = None;
        self
    }

    /// Appends the next bytes of the part.
    pub fn take(&mut self, data: &[u8]) -> Result<()> {
        let Some(due) = self.bytes_due else {
            return Ok(());
        };
        if self.bytes.len() + data.len() > due {
            let message = format!(
                "a part of {} has more than the {due} bytes of its extent",
                self.tensor
            );
            return Err(refused(&self.tensor, message));
        }
        if self.bytes.capacity() == 0 {
            self.bytes.reserve_exact(due);
        }
        if let Some((checksum, _)) = &mut self.checksum {
            checksum.update(data);
        }
        self.bytes.extend_from_slice(data);
        Ok(())
    }

    /// Returns whether it has all its bytes. A buffer that is thrown away is never full.
    pub fn is_full(&self) -> bool {
        self.bytes_due == Some(self.bytes.len())
    }

    /// Returns whether the part may end here.
    pub fn may_end(&self) -> bool {
        self.bytes_due.is_none_or(|due| due == self.bytes.len())
    }
}
