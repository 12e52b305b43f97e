//! Fidelities: how much of the image tower is computed.
use super::{config::VisionConfig, flops};
use crate::error::{Error, Result};
use superbatch_proto::v1::{self, Approximation, Reason, approximation::By};

/// The fidelity at which images are embedded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Fidelity {
    #[default]
    Full,
    /// Images of this side in pixels, cut into patches of the same size.
    Resolution(usize),
}

impl Fidelity {
    /// Returns the fidelity of a request; full if it names no approximation.
    ///
    /// # Errors
    /// `Unimplemented` for an approximation that this version does not know.
    pub fn of(approximation: Option<&Approximation>) -> Result<Self> {
        match approximation.map(|approximation| approximation.by) {
            None => Ok(Self::Full),
            Some(Some(By::Resolution(side))) => Ok(Self::Resolution(side as usize)),
            Some(None) => {
                let message = "the approximation is none that this worker knows; update the worker";
                Err(Error::new(Reason::Unimplemented, message).with("feature", "approximation"))
            }
        }
    }

    /// Returns the name in the keys of reference embeddings. The name of full must not change:
    /// embeddings stored by earlier versions have it.
    pub fn name(self) -> String {
        let of = |fidelity: v1::Fidelity| fidelity.as_str_name();
        match self {
            Self::Full => of(v1::Fidelity::Full).to_owned(),
            Self::Resolution(side) => {
                format!("{} resolution={side}", of(v1::Fidelity::Approximate))
            }
        }
    }

    /// Returns the side of an image in pixels.
    ///
    /// # Errors
    /// `ModelInvalid` if the model cannot be run at this fidelity.
    pub fn side(self, tower: &flops::ImageTower) -> Result<usize> {
        let Self::Resolution(side) = self else {
            return Ok(tower.image_size);
        };
        if fits(side, tower.image_size, tower.patch_size) {
            return Ok(side);
        }
        let message = format!(
            "resolution {side} is no multiple of the model's patch of {} pixels up to its image of \
             {}",
            tower.patch_size, tower.image_size
        );
        Err(Error::new(Reason::ModelInvalid, message).with("field", "resolution"))
    }
}

/// Returns whether a model takes images of that side.
pub fn takes(config: &VisionConfig, side: usize) -> bool {
    side == config.image_size || fits(side, config.image_size, config.patch_size)
}

fn fits(side: usize, image_size: usize, patch_size: usize) -> bool {
    side > 0 && side <= image_size && side.is_multiple_of(patch_size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_side_is_a_multiple_of_the_patch_within_the_image() {
        let tower = flops::ImageTower {
            image_size: 50,
            patch_size: 16,
            ..Default::default()
        };
        assert_eq!(Fidelity::Full.side(&tower).unwrap(), 50);
        assert_eq!(Fidelity::Resolution(32).side(&tower).unwrap(), 32);
        for side in [0, 8, 40, 64] {
            let error = Fidelity::Resolution(side).side(&tower).unwrap_err();
            assert_eq!(error.reason(), Reason::ModelInvalid, "{side}");
        }
    }

    #[test]
    fn names_tell_fidelities_apart() {
        assert_eq!(Fidelity::Full.name(), "FIDELITY_FULL");
        assert_eq!(
            Fidelity::Resolution(16).name(),
            "FIDELITY_APPROXIMATE resolution=16"
        );
        let unknown = Fidelity::of(Some(&Approximation { by: None })).unwrap_err();
        assert_eq!(unknown.reason(), Reason::Unimplemented);
        assert_eq!(Fidelity::of(None).unwrap(), Fidelity::Full);
    }
}
