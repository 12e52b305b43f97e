//! The worker's settings.
use crate::error::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A reference and a learner. With room for one only, they would push each other off the device at
/// every micro-batch.
const MODELS_MIN: usize = 2;

/// A scoring worker: its device, and how much memory each part may use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct WorkerConfig {
    /// Where models run: `auto` (the first CUDA device if there is one), `cpu`, `cuda`, or
    /// `cuda:N`.
    pub device: String,
    /// Threads that decode images, and that models on a CPU use. 0 is one for each core.
    pub threads: usize,
    /// Slices that are read, decoded or embedded at the same time; while one waits for its
    /// coordinator it does not count. As many calls for the rows of served steps go on beside them.
    /// 0 is one for every 16 threads, at least 2.
    pub slots: usize,
    /// Memory for blocks as they were read, in bytes: super-batches that follow each other share
    /// blocks.
    pub block_cache_bytes: usize,
    /// Folder on a local disk for blocks of remote shards as they were read, so that later epochs
    /// and other runs read them from there. It belongs to one process. `null` keeps none.
    pub disk_cache_dir: Option<PathBuf>,
    /// Most bytes in `disk_cache_dir`. If it is full the blocks used longest ago are removed.
    pub disk_cache_bytes: u64,
    /// Memory for the rows of slices that wait to be chosen, in bytes. Up to half of it holds
    /// blocks whole, which steps share, where no model is waited for. If it is full the newest
    /// step's rows are dropped, and the chosen ones are read again.
    pub row_bytes_max: usize,
    /// Memory for large buffers that are free and wait to be used again, in bytes. New ones would
    /// cost the time in which the kernel clears them.
    pub buffer_bytes_max: usize,
    /// Memory for decoded images that wait for the learner, in bytes. If it is full the newest
    /// step's are dropped, and decoded again.
    pub decoded_bytes_max: usize,
    /// Memory for chosen rows that trainers fetch from this worker (`delivery` direct), in bytes.
    /// If it is full the newest step's are let go, and the coordinator serves them.
    pub held_bytes_max: usize,
    /// How long chosen rows are held for trainers at most, in seconds.
    pub held_seconds: u64,
    /// Memory for reference embeddings, in bytes. What does not fit is read from the sidecar again.
    pub reference_cache_bytes: usize,
    /// Largest image, in pixels; a larger one makes its row unusable. Set it alike on all workers
    /// of a run, else which rows are left out depends on the worker that reads them.
    pub image_pixels_max: u64,
    /// Largest encoded image, in bytes; a larger one makes its row unusable. Set it alike on all
    /// workers of a run.
    pub image_bytes_max: u64,
    /// Images that are read at the same time where the data has their paths: each is a request to
    /// the store. Those under way hold at most this number times `image_bytes_max` of memory. The
    /// images of a micro-batch, and those chosen of a block, are held together once they are read:
    /// up to 2 GiB for each such read, of which a worker has several under way.
    pub image_reads_max: usize,
    /// Models that stay on the device, at least 2; the one used longest ago leaves for another. A
    /// run wants its reference, two states of its learner, and room for one that is being verified.
    pub models_max: usize,
    /// How long one piece of work may take on the device, in seconds: a micro-batch, a model that
    /// is loaded, a selection. After that the device counts as hung, and its slices go to other
    /// workers until it is well again.
    pub device_deadline_seconds: u64,
    /// How long the decoding of one row may take, in seconds. After that the row counts as one that
    /// cannot be used. The same on all workers of a run.
    pub decode_deadline_seconds: u64,
    /// SHA-256, in hex, of the exported modules (`module.pt` of a model folder) that may be run.
    /// TorchScript is code, which runs as the worker: name only what you exported yourself.
    pub exported_modules: Vec<String>,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        Self {
            device: "auto".into(),
            threads: 0,
            slots: 0,
            block_cache_bytes: 512 << 20,
            disk_cache_dir: None,
            disk_cache_bytes: 0,
            row_bytes_max: 1 << 30,
            buffer_bytes_max: 128 << 20,
            decoded_bytes_max: 1 << 30,
            held_bytes_max: 1 << 30,
            held_seconds: 600,
            reference_cache_bytes: 128 << 20,
            // As many as Pillow takes before it warns of a decompression bomb.
            image_pixels_max: 89_478_485,
            image_bytes_max: 64 << 20,
            image_reads_max: 64,
            models_max: 4,
            device_deadline_seconds: 600,
            decode_deadline_seconds: 120,
            exported_modules: Vec::new(),
        }
    }
}

impl WorkerConfig {
    /// Refuses settings that cannot work.
    ///
    /// # Errors
    /// `InvalidArgument`, naming the field.
    pub fn validate(&self) -> Result<()> {
        let positive = [
            ("worker.held_seconds", self.held_seconds),
            ("worker.image_pixels_max", self.image_pixels_max),
            ("worker.image_bytes_max", self.image_bytes_max),
            ("worker.image_reads_max", self.image_reads_max as u64),
            (
                "worker.device_deadline_seconds",
                self.device_deadline_seconds,
            ),
            (
                "worker.decode_deadline_seconds",
                self.decode_deadline_seconds,
            ),
        ];
        if let Some((field, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(Error::invalid(
                field,
                format!("{field} is 0; set it to 1 or more"),
            ));
        }
        self.validate_disk_cache()?;
        let is_hex = |text: &String| {
            text.len() == 64 && text.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'))
        };
        if let Some(other) = self.exported_modules.iter().find(|text| !is_hex(text)) {
            let message = format!(
                "worker.exported_modules has {other:?}; give SHA-256 in 64 lower-case hex digits, \
                 as sha256sum module.pt prints it"
            );
            return Err(Error::invalid("worker.exported_modules", message));
        }
        let number = self.device.strip_prefix("cuda:");
        let is_device = number.map_or(
            ["auto", "cpu", "cuda"].contains(&self.device.as_str()),
            |n| n.parse::<u32>().is_ok(),
        );
        if !is_device {
            let message = format!(
                "worker.device is {:?}; use auto, cpu, cuda or cuda:N",
                self.device
            );
            return Err(Error::invalid("worker.device", message));
        }
        if self.models_max < MODELS_MIN {
            let (field, max) = ("worker.models_max", self.models_max);
            let message = format!(
                "{field} is {max}; a run scores with two models, so set it to {MODELS_MIN} or more"
            );
            return Err(Error::invalid(field, message));
        }
        Ok(())
    }

    fn validate_disk_cache(&self) -> Result<()> {
        let (dir, bytes) = (self.disk_cache_dir.as_ref(), self.disk_cache_bytes);
        let (field, message) = match dir.map(|dir| dir.as_os_str().is_empty()) {
            None if bytes > 0 => (
                "worker.disk_cache_dir",
                "worker.disk_cache_bytes is given and worker.disk_cache_dir is not; name a folder \
                 on a local disk",
            ),
            Some(true) => (
                "worker.disk_cache_dir",
                "worker.disk_cache_dir is empty; name a folder on a local disk, or write null",
            ),
            Some(false) if bytes == 0 => (
                "worker.disk_cache_bytes",
                "worker.disk_cache_bytes is 0; say how much the folder may hold, such as \
                 107374182400 for 100 GiB",
            ),
            _ => return Ok(()),
        };
        Err(Error::invalid(field, message))
    }

    /// Returns the number of threads on a machine of `cores`.
    pub fn threads_on(&self, cores: usize) -> usize {
        if self.threads == 0 {
            cores.max(1)
        } else {
            self.threads
        }
    }

    /// Returns the number of slots with that many threads.
    pub fn slots_on(&self, threads: usize) -> usize {
        if self.slots == 0 {
            (threads / 16).max(2)
        } else {
            self.slots
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_means_as_the_machine_is() {
        let config = WorkerConfig::default();
        for (cores, slots) in [(1, 2), (2, 2), (128, 8)] {
            assert_eq!(config.threads_on(cores), cores);
            assert_eq!(config.slots_on(cores), slots);
        }
        let config = WorkerConfig {
            threads: 3,
            slots: 1,
            ..config
        };
        assert_eq!((config.threads_on(128), config.slots_on(3)), (3, 1));
    }

    #[test]
    fn nonsense_is_refused_by_field() {
        for (config, field) in [
            (
                WorkerConfig {
                    models_max: 1,
                    ..Default::default()
                },
                "worker.models_max",
            ),
            (
                WorkerConfig {
                    device: "cuda:x".into(),
                    ..Default::default()
                },
                "worker.device",
            ),
            (
                WorkerConfig {
                    image_pixels_max: 0,
                    ..Default::default()
                },
                "worker.image_pixels_max",
            ),
            (
                WorkerConfig {
                    disk_cache_dir: Some("/cache".into()),
                    ..Default::default()
                },
                "worker.disk_cache_bytes",
            ),
            (
                WorkerConfig {
                    disk_cache_bytes: 1 << 30,
                    ..Default::default()
                },
                "worker.disk_cache_dir",
            ),
            (
                WorkerConfig {
                    disk_cache_dir: Some("".into()),
                    disk_cache_bytes: 1 << 30,
                    ..Default::default()
                },
                "worker.disk_cache_dir",
            ),
        ] {
            assert_eq!(config.validate().unwrap_err().value("field"), Some(field));
        }
        assert!(
            serde_yaml_ng::from_str::<WorkerConfig>("model_max: 1").is_err(),
            "a misspelt key is refused"
        );
    }
}
