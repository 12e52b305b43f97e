//! Fidelities: how much of an image tower is computed, which towers can, and what it costs.
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use superbatch_proto::v1::{self, Approximation, Reason, approximation::By};

/// The fidelity at which images are embedded.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum Fidelity {
    #[default]
    Full,
    /// Images of this side in pixels, cut into patches of the same size.
    Resolution(u32),
    /// Patches of this side in pixels, cut from images of the same size.
    Patch(u32),
    /// This share of the patches is left out.
    PatchDropout(f64),
    /// So many layers, from the first on.
    Layers(u32),
}

impl Fidelity {
    /// Returns the fidelity of a request; full if it names no approximation.
    ///
    /// # Errors
    /// `Unimplemented` for an approximation that this version does not know.
    pub fn of(approximation: Option<&Approximation>) -> Result<Self> {
        match approximation.map(|approximation| approximation.by) {
            None => Ok(Self::Full),
            Some(Some(by)) => Ok(by.into()),
            Some(None) => {
                let message =
                    "the approximation is none that this version knows; update the worker";
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
            _ => format!("{} {self}", of(v1::Fidelity::Approximate)),
        }
    }

    /// Returns the field of `Approximation` that asks for it; empty for full fidelity.
    pub fn field(self) -> &'static str {
        match self {
            Self::Full => "",
            Self::Resolution(_) => "resolution",
            Self::Patch(_) => "patch",
            Self::PatchDropout(_) => "patch_dropout",
            Self::Layers(_) => "layers",
        }
    }

    /// Returns the field's value; 0 for full fidelity.
    pub fn value(self) -> f64 {
        match self {
            Self::Full => 0.0,
            Self::Resolution(n) | Self::Patch(n) | Self::Layers(n) => f64::from(n),
            Self::PatchDropout(share) => share,
        }
    }
}

/// `full`, or as `resolution=128`.
impl fmt::Display for Fidelity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => f.write_str("full"),
            _ => write!(f, "{}={}", self.field(), self.value()),
        }
    }
}

impl From<By> for Fidelity {
    fn from(by: By) -> Self {
        match by {
            By::Resolution(side) => Self::Resolution(side),
            By::Patch(side) => Self::Patch(side),
            By::PatchDropout(share) => Self::PatchDropout(share),
            By::Layers(count) => Self::Layers(count),
        }
    }
}

/// The sizes of an image tower (of an exported module, whose inside is not known, with a patch of
/// 0), and the cost of one image of n patches at all of its layers:
/// `constant + per_patch * n + per_patch_pair * n²` FLOPs. Zero where an older build wrote it down
/// without.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct ImageTower {
    /// Side in pixels at full fidelity.
    pub image_size: u32,
    pub patch_size: u32,
    #[serde(default)]
    pub layers: u32,
    pub constant: f64,
    pub per_patch: f64,
    pub per_patch_pair: f64,
    #[serde(default)]
    pub layer_constant: f64,
    #[serde(default)]
    pub layer_per_patch: f64,
    #[serde(default)]
    pub layer_per_patch_pair: f64,
    #[serde(default)]
    pub per_pixel: f64,
    /// The most patches of an image of any shape (NaFlex), to which every image is padded. 0 if all
    /// images have one size; `image_size` is then its side, and else that of the position grid.
    #[serde(default)]
    pub max_patches: u32,
}

impl ImageTower {
    /// Returns why the tower cannot be run at a fidelity, as what it has and what to give.
    pub fn refuses(&self, fidelity: Fidelity) -> Option<String> {
        let (image, patch) = (self.image_size, self.patch_size.max(1));
        let sizes = || format!("takes images of {image} pixels in patches of {patch}");
        let is_known = self.layers > 0;
        match fidelity {
            Fidelity::Full => None,
            _ if self.max_patches > 0 => Some(format!(
                "takes images of any shape (NaFlex), for which the fidelity {fidelity} is not \
                 built; score at full fidelity, or give its folder a smaller max_num_patches"
            )),
            _ if self.patch_size == 0 => {
                Some("is an exported module, which is run at full fidelity only".to_owned())
            }
            Fidelity::Resolution(side) => {
                let fits = side > 0 && side < image && side.is_multiple_of(patch);
                let give = || format!("{}; give a multiple of {patch} below {image}", sizes());
                (!fits).then(give)
            }
            _ if !is_known => Some("was described by an older build; open another run".to_owned()),
            Fidelity::Patch(side) => {
                let fits = side > patch && side <= image && image.is_multiple_of(side);
                let give = || format!("{}; give a divisor of {image} above {patch}", sizes());
                (!fits).then(give)
            }
            Fidelity::PatchDropout(share) => {
                let fits = share > 0.0 && share < 1.0;
                let give = || "leaves out a share above 0 and below 1".to_owned();
                (!fits).then(give)
            }
            Fidelity::Layers(count) => {
                let fits = count > 0 && count < self.layers;
                let give = || format!("has {} layers; give fewer, and at least 1", self.layers);
                (!fits).then(give)
            }
        }
    }

    /// Returns the side of an image in pixels.
    pub fn side(&self, fidelity: Fidelity) -> u32 {
        match fidelity {
            Fidelity::Resolution(side) => side,
            _ => self.image_size,
        }
    }

    /// Returns how many pixels an image has as the tower takes it, padding included.
    pub fn pixels(&self, fidelity: Fidelity) -> usize {
        match self.max_patches as usize {
            0 => (self.side(fidelity) as usize).pow(2),
            most => most * (self.patch_size as usize).pow(2),
        }
    }

    /// Returns how many patches of an image pass through the layers, padding included.
    pub fn patches(&self, fidelity: Fidelity) -> usize {
        let cut = |side: u32, patch: u32| ((side / patch.max(1)) as usize).pow(2);
        if self.max_patches > 0 {
            return self.max_patches as usize;
        }
        match fidelity {
            Fidelity::Resolution(side) => cut(side, self.patch_size),
            Fidelity::Patch(patch) => cut(self.image_size, patch),
            Fidelity::PatchDropout(share) => kept(cut(self.image_size, self.patch_size), share),
            Fidelity::Full | Fidelity::Layers(_) => cut(self.image_size, self.patch_size),
        }
    }

    /// Returns the FLOPs to embed one image.
    pub fn flops(&self, fidelity: Fidelity) -> f64 {
        let n = self.patches(fidelity) as f64;
        let whole = self.constant + self.per_patch * n + self.per_patch_pair * n * n;
        let area = |patch: u32| f64::from(patch).powi(2);
        match fidelity {
            Fidelity::Full | Fidelity::Resolution(_) => whole,
            Fidelity::Patch(patch) => {
                whole + self.per_pixel * n * (area(patch) - area(self.patch_size))
            }
            Fidelity::PatchDropout(_) => {
                // Patches are left out after they are embedded, since they need their positions.
                let out = self.patches(Fidelity::Full) as f64 - n;
                whole + self.per_pixel * out * area(self.patch_size)
            }
            Fidelity::Layers(count) => {
                let left_out = f64::from(self.layers.saturating_sub(count));
                let layer = self.layer_constant
                    + self.layer_per_patch * n
                    + self.layer_per_patch_pair * n * n;
                whole - left_out * layer
            }
        }
    }
}

/// Returns how many of `patches` are left where a share of them is dropped, as open_clip and timm
/// count them.
pub fn kept(patches: usize, dropped: f64) -> usize {
    ((patches as f64 * (1.0 - dropped)) as usize).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of 50 pixels, patches of 16 (9 of them) and 3 layers.
    fn tower() -> ImageTower {
        ImageTower {
            image_size: 50,
            patch_size: 16,
            layers: 3,
            constant: 5.0,
            per_patch: 3.0 * 16.0 * 16.0 + 4.0,
            per_patch_pair: 6.0,
            layer_constant: 1.0,
            layer_per_patch: 1.0,
            layer_per_patch_pair: 2.0,
            per_pixel: 3.0,
            max_patches: 0,
        }
    }

    #[test]
    fn a_tower_says_what_it_can_be_run_at() {
        let takes = [
            Fidelity::Full,
            Fidelity::Resolution(32),
            Fidelity::Resolution(48),
            Fidelity::Patch(25),
            Fidelity::Patch(50),
            Fidelity::PatchDropout(0.5),
            Fidelity::Layers(2),
        ];
        for fidelity in takes {
            assert_eq!(tower().refuses(fidelity), None, "{fidelity}");
        }
        let refuses = [
            Fidelity::Resolution(0),
            Fidelity::Resolution(8),
            Fidelity::Resolution(40),
            Fidelity::Resolution(64),
            Fidelity::Patch(0),
            Fidelity::Patch(16),
            Fidelity::Patch(10),
            Fidelity::Patch(32),
            Fidelity::Patch(100),
            Fidelity::PatchDropout(0.0),
            Fidelity::PatchDropout(1.0),
            Fidelity::PatchDropout(f64::NAN),
            Fidelity::Layers(0),
            Fidelity::Layers(3),
        ];
        for fidelity in refuses {
            assert!(tower().refuses(fidelity).is_some(), "{fidelity}");
        }
        let exported = ImageTower {
            patch_size: 0,
            ..tower()
        };
        assert_eq!(exported.refuses(Fidelity::Full), None);
        assert!(exported.refuses(Fidelity::Resolution(32)).is_some());
        let older = ImageTower {
            layers: 0,
            ..tower()
        };
        assert_eq!(older.refuses(Fidelity::Resolution(32)), None);
        assert!(
            older
                .refuses(Fidelity::Layers(2))
                .unwrap()
                .contains("older build")
        );
    }

    #[test]
    fn images_of_any_shape_are_scored_whole() {
        let naflex = ImageTower {
            max_patches: 12,
            ..tower()
        };
        assert_eq!(naflex.refuses(Fidelity::Full), None);
        for fidelity in [
            Fidelity::Resolution(32),
            Fidelity::Patch(25),
            Fidelity::PatchDropout(0.5),
            Fidelity::Layers(2),
        ] {
            let said = naflex.refuses(fidelity).unwrap();
            let named = format!("the fidelity {fidelity} is not built");
            assert!(said.contains("NaFlex") && said.contains(&named), "{said}");
        }
        // Padding is computed, too.
        assert_eq!(naflex.patches(Fidelity::Full), 12);
        assert_eq!(naflex.pixels(Fidelity::Full), 12 * 16 * 16);
        assert_eq!(tower().pixels(Fidelity::Resolution(32)), 32 * 32);
        let cost = 5.0 + (768.0 + 4.0) * 12.0 + 6.0 * 144.0;
        assert_eq!(naflex.flops(Fidelity::Full), cost);
    }

    #[test]
    fn each_fidelity_costs_what_is_left_to_compute() {
        let whole = |n: f64| 5.0 + (768.0 + 4.0) * n + 6.0 * n * n;
        assert_eq!(tower().flops(Fidelity::Full), whole(9.0));
        assert_eq!(tower().flops(Fidelity::Resolution(32)), whole(4.0));
        // Four patches of 25 pixels, which are embedded at 3 a pixel.
        let patch = whole(4.0) + 4.0 * 3.0 * (625.0 - 256.0);
        assert_eq!(tower().flops(Fidelity::Patch(25)), patch);
        // All nine are embedded, four go on.
        let dropped = whole(4.0) + 5.0 * 768.0;
        assert_eq!(tower().flops(Fidelity::PatchDropout(0.5)), dropped);
        let layer = 1.0 + 9.0 + 2.0 * 81.0;
        assert_eq!(tower().flops(Fidelity::Layers(1)), whole(9.0) - 2.0 * layer);
    }

    #[test]
    fn as_many_patches_are_kept_as_the_libraries_keep() {
        assert_eq!([kept(196, 0.5), kept(49, 0.5), kept(10, 0.75)], [98, 24, 2]);
        assert_eq!(kept(4, 0.99), 1);
    }

    #[test]
    fn names_tell_fidelities_apart() {
        let of = |by| {
            Fidelity::of(Some(&Approximation { by: Some(by) }))
                .unwrap()
                .name()
        };
        assert_eq!(Fidelity::of(None).unwrap().name(), "FIDELITY_FULL");
        assert_eq!(of(By::Resolution(16)), "FIDELITY_APPROXIMATE resolution=16");
        assert_eq!(of(By::Patch(32)), "FIDELITY_APPROXIMATE patch=32");
        assert_eq!(
            of(By::PatchDropout(0.5)),
            "FIDELITY_APPROXIMATE patch_dropout=0.5"
        );
        assert_eq!(of(By::Layers(6)), "FIDELITY_APPROXIMATE layers=6");
        let unknown = Fidelity::of(Some(&Approximation { by: None })).unwrap_err();
        assert_eq!(unknown.reason(), Reason::Unimplemented);
    }
}
