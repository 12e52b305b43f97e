use super::*;
use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};
use superbatch_proto::v1::Reason;

fn parse(json: &str) -> Preprocess {
    Preprocess::parse(json.as_bytes()).unwrap()
}

fn png(width: u32, height: u32, value: u8) -> Vec<u8> {
    let (mut bytes, pixels) = (Vec::new(), vec![value; (width * height * 3) as usize]);
    PngEncoder::new(&mut bytes)
        .write_image(&pixels, width, height, ExtendedColorType::Rgb8)
        .unwrap();
    bytes
}

#[test]
fn without_a_name_the_model_says_whose_processor_it_is() {
    let json = br#"{"size": 32, "image_mean": [0.5, 0.5, 0.5]}"#;
    let of = |processor| Preprocess::of(json, processor).unwrap();
    assert_eq!(of(Some(Processor::Clip)).crop, Some((224, 224)));
    assert_eq!(of(Some(Processor::Siglip)).crop, None);
    assert_eq!(of(None).crop, None);
    assert_eq!(of(Some(Processor::Siglip2)).patches(), Some((16, 256)));
}

#[test]
fn what_is_left_out_has_the_processors_default() {
    let siglip = parse(r#"{"image_processor_type": "SiglipImageProcessor"}"#);
    assert_eq!(
        (siglip.size(), siglip.resample, siglip.crop),
        ((224, 224), 3, None)
    );
    assert_eq!(
        siglip.normalisation(),
        Normalisation {
            rescale: 1.0 / 255.0,
            mean: [0.5; 3],
            std: [0.5; 3]
        }
    );
    let clip = parse(
        r#"{"feature_extractor_type": "CLIPFeatureExtractor", "size": 30, "crop_size": 24,
            "resample": 2}"#,
    );
    assert_eq!(
        (clip.size(), clip.target, clip.resample),
        ((24, 24), Target::ShortestEdge(30), 2)
    );
    assert_eq!(clip.normalisation().std[2], 0.275_777_1);
    let plain =
        parse(r#"{"do_rescale": false, "do_normalize": false, "size": {"height": 8, "width": 6}}"#);
    assert_eq!(plain.size(), (8, 6));
    assert_eq!(
        plain.normalisation(),
        Normalisation {
            rescale: 1.0,
            mean: [0.0; 3],
            std: [1.0; 3]
        }
    );
}

#[test]
fn what_decides_the_pixels_decides_the_digest() {
    let a = parse(r#"{"size": 8, "resample": 3}"#);
    assert_eq!(
        a.digest(),
        parse(r#"{"resample": 3, "size": {"width": 8, "height": 8}, "do_convert_rgb": true}"#)
            .digest()
    );
    assert_ne!(a.digest(), parse(r#"{"size": 8, "resample": 2}"#).digest());
    assert_ne!(
        a.digest(),
        parse(r#"{"size": 8, "image_mean": 0.4}"#).digest()
    );
}

#[test]
fn what_cannot_be_done_is_refused_by_field() {
    for (json, field) in [
        ("[", ""),
        (
            r#"{"image_processor_type": "ViTImageProcessor"}"#,
            "image_processor_type",
        ),
        (r#"{"resample": 1}"#, "resample"),
        (r#"{"do_resize": false}"#, "do_resize"),
        (
            r#"{"do_center_crop": false, "size": {"shortest_edge": 8}}"#,
            "do_center_crop",
        ),
        (
            r#"{"size": {"shortest_edge": 8, "longest_edge": 9}}"#,
            "size",
        ),
        (r#"{"size": 0}"#, "size"),
        (r#"{"crop_size": {"height": 3}}"#, "crop_size"),
        (r#"{"image_std": [1, 0, 1]}"#, "image_std"),
        (
            r#"{"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 0}"#,
            "max_num_patches",
        ),
        (
            r#"{"image_processor_type": "Siglip2ImageProcessor", "patch_size": 1.5}"#,
            "patch_size",
        ),
        (
            r#"{"image_processor_type": "Siglip2ImageProcessor", "patch_size": 4096,
                "max_num_patches": 2}"#,
            "max_num_patches",
        ),
        (r#"{"image_mean": [1, 0]}"#, "image_mean"),
    ] {
        let error = Preprocess::parse(json.as_bytes()).unwrap_err();
        assert_eq!(
            (error.reason(), error.value("field")),
            (Reason::ModelInvalid, Some(field)),
            "{json}"
        );
    }
}

#[test]
fn images_of_any_shape_become_patches() {
    let of = |more: &str| {
        parse(&format!(
            r#"{{"image_processor_type": "Siglip2ImageProcessorFast", "patch_size": 8, {more}}}"#
        ))
    };
    // As the fast processor saves it: what it has no use for is null.
    let config = of(r#""max_num_patches": 12, "do_center_crop": null, "size": null"#);
    assert_eq!((config.patches(), config.resample), (Some((8, 12)), 2));
    let limits = ImageLimits {
        pixels_max: 10_000,
        bytes_max: 10_000,
    };
    let pixels = |width, height| config.pixels(&png(width, height, 9), &limits).unwrap();
    for ((width, height), grid) in [((40, 30), [3, 4]), ((1, 40), [12, 1]), ((8, 8), [3, 3])] {
        let found = pixels(width, height);
        assert_eq!(found.grid, Some(grid), "{width}x{height}");
        let count = (grid[0] * grid[1]) as usize;
        assert_eq!(found.bytes, vec![9; count * 8 * 8 * 3]);
    }
    // Kept embeddings of more patches are not those of fewer.
    assert_ne!(
        config.digest(),
        of(r#""max_num_patches": 16"#).digest(),
        "of another number of patches"
    );
}

#[test]
fn a_crop_larger_than_the_image_is_black_around_it() {
    let config = parse(
        r#"{"do_center_crop": true, "size": {"height": 2, "width": 3},
            "crop_size": {"height": 5, "width": 5}}"#,
    );
    let pixels = config
        .pixels(
            &png(7, 4, 9),
            &ImageLimits {
                pixels_max: 100,
                bytes_max: 1000,
            },
        )
        .unwrap();
    let lit: Vec<usize> = (0..25).filter(|n| pixels.bytes[n * 3] == 9).collect();
    assert_eq!(
        lit,
        [11, 12, 13, 16, 17, 18],
        "the larger half of the spare comes first"
    );
}

#[test]
fn a_sliver_is_cropped_before_it_grows() {
    let limits = ImageLimits {
        pixels_max: 100_000,
        bytes_max: 100_000,
    };
    let clip = parse(r#"{"size": {"shortest_edge": 24}, "crop_size": 24, "do_center_crop": true}"#);
    assert_eq!(
        clip.pixels(&png(4000, 1, 9), &limits).unwrap().bytes,
        vec![9; 24 * 24 * 3]
    );
    assert_eq!(
        clip.pixels(&png(1, 5000, 9), &limits).unwrap().bytes,
        vec![9; 24 * 24 * 3]
    );
    let squashed = parse(r#"{"size": 24}"#);
    let fault = squashed.pixels(&png(1, 5000, 9), &limits).unwrap_err();
    assert_eq!(
        fault.reason,
        BadRowReason::ImageTooLarge,
        "{}",
        fault.detail
    );
}
