//! Names of the columns that the service adds to rows. Coordinator, workers and clients read them
//! of each other.

/// What the names of all these columns begin with. No column of a data set does.
pub const OWN: &str = "_superbatch_";

/// The row's id.
pub const ID: &str = "_superbatch_id";
/// The row's position in the data set's order.
pub const POSITION: &str = "_superbatch_position";
/// By which the row was chosen.
pub const SCORE: &str = "_superbatch_score";
/// What a mean over the rows weighs it by.
pub const WEIGHT: &str = "_superbatch_weight";
/// At which fidelity the trainer is to read it.
pub const FIDELITY: &str = "_superbatch_fidelity";
/// Which tokens of the row are to be trained.
pub const TOKEN_MASK: &str = "_superbatch_token_mask";
/// A trainer's own loss, as a score column of later steps.
pub const LOSS: &str = "_superbatch_loss";

/// BLAKE3 of image and caption, cut to 16 bytes.
pub const CONTENT_HASH: &str = "_superbatch_content_hash";

/// The file that a located row lies in.
pub const URI: &str = "_superbatch_uri";
/// The number of that file in its source.
pub const SHARD: &str = "_superbatch_shard";
/// The row's number in that file.
pub const ROW: &str = "_superbatch_row";
/// The row group of a Parquet file that holds the row.
pub const ROW_GROUP: &str = "_superbatch_row_group";
/// The row's number in that row group.
pub const ROW_IN_GROUP: &str = "_superbatch_row_in_group";
/// Where the image begins in its tar.
pub const IMAGE_OFFSET: &str = "_superbatch_image_offset";
/// The image's bytes in its tar.
pub const IMAGE_LENGTH: &str = "_superbatch_image_length";
/// Where the image lies, if that is beside the shards.
pub const IMAGE_URI: &str = "_superbatch_image_uri";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_have_the_prefix_that_data_sets_may_not_use() {
        for name in [
            ID,
            POSITION,
            SCORE,
            WEIGHT,
            FIDELITY,
            TOKEN_MASK,
            LOSS,
            CONTENT_HASH,
            URI,
            SHARD,
            ROW,
            ROW_GROUP,
            ROW_IN_GROUP,
            IMAGE_OFFSET,
            IMAGE_LENGTH,
            IMAGE_URI,
        ] {
            assert!(name.starts_with(OWN), "{name}");
        }
    }
}
