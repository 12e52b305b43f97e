use super::*;
use crate::worker::model::{init, open_clip_config};

const SMALL: &str = r#""hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 4"#;

fn encoder(config: &ModelConfig) -> Encoder {
    let weights = init::random(&config.parameters(), 5).unwrap();
    let snapshot = Snapshot::parse(vec![weights]).unwrap();
    Encoder::load(config, &snapshot, Compute::F32, Device::Cpu).unwrap()
}

/// Of captions that end after 2, 9 and 5 of 30 tokens: how far their embeddings are from those
/// of the whole length, and how many tokens were embedded.
fn apart(config: &ModelConfig, end: i64, pad: i64) -> (f64, usize) {
    let encoder = encoder(config);
    let row = |length: usize| {
        let word = |n: usize| 1 + (n * length) as i64 % 50;
        let mut row: Vec<i64> = (0..30).map(word).collect();
        row[length - 1] = end;
        row[length..].fill(pad);
        row
    };
    let ids: Vec<i64> = [2, 9, 5].into_iter().flat_map(row).collect();
    let whole = Tensor::from_slice(&ids).reshape([3, 30]);
    let whole = unit(&encoder.towers.text(&whole).unwrap()).unwrap();
    let cut = encoder.text(&ids, 3).unwrap();
    let apart = (whole - cut).abs().max().double_value(&[]);
    (apart, encoder.text_seen(&ids))
}

#[test]
fn captions_without_their_padding_are_the_same_to_a_causal_tower() {
    for (eos, end, pad) in [(60, 60, 0), (60, 60, 60), (2, 63, 0)] {
        let json = format!(
            r#"{{"model_type": "clip", "projection_dim": 16,
                "vision_config": {{{SMALL}, "image_size": 8, "patch_size": 4}},
                "text_config": {{{SMALL}, "max_position_embeddings": 30, "vocab_size": 64,
                "eos_token_id": {eos}}}}}"#
        );
        let config = ModelConfig::parse(json.as_bytes()).unwrap();
        let (apart, seen) = apart(&config, end, pad);
        assert!(apart < 1e-6 && seen == 16, "{eos} {pad}: {apart} of {seen}");
    }
    let json = r#"{"model_cfg": {"embed_dim": 16,
        "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 32, "layers": 1,
            "head_width": 8},
        "text_cfg": {"context_length": 30, "vocab_size": 64, "width": 32, "heads": 4,
            "layers": 3}}}"#;
    let config = open_clip_config::parse(json.as_bytes()).unwrap();
    let (apart, seen) = apart(&config, 63, 0);
    assert!(apart < 1e-6 && seen == 16, "{apart} of {seen}");
}

fn naflex() -> Encoder {
    let json = format!(
        r#"{{"model_type": "siglip2",
            "vision_config": {{{SMALL}, "num_patches": 16, "patch_size": 2}},
            "text_config": {{{SMALL}, "max_position_embeddings": 30, "vocab_size": 64}}}}"#
    );
    let mut config = ModelConfig::parse(json.as_bytes()).unwrap();
    let most = br#"{"max_num_patches": 12}"#;
    config.take_max_patches(most).unwrap();
    encoder(&config)
}

#[test]
fn only_an_images_own_patches_decide_its_embedding() {
    const ROW: usize = 12 * 2 * 2 * 3;
    let (encoder, plain) = (naflex(), [0.5; 3]);
    let normalisation = Normalisation {
        rescale: 1.0 / 255.0,
        mean: plain,
        std: plain,
    };
    let embedded = |pixels: &[u8], grids: &[[u32; 2]]| {
        let images = Images {
            pixels,
            keys: &vec![0; grids.len()],
            grids,
        };
        encoder.image(&images, Fidelity::Full, &normalisation)
    };
    let apart = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
    let mut pixels: Vec<u8> = (0..2 * ROW).map(|i| (i * 37 % 251) as u8).collect();
    let grids = [[2, 3], [3, 4]];
    let both = embedded(&pixels, &grids).unwrap();
    assert_eq!(both.size(), [2, 32]);
    // What is behind the six patches of the first image, and the image beside it.
    pixels[ROW / 2..ROW].fill(0);
    let alone = embedded(&pixels[..ROW], &grids[..1]).unwrap();
    assert!(apart(&alone, &both.narrow(0, 0, 1)) < 1e-5);
    // The last of its own patches, and its shape.
    let turned = embedded(&pixels[..ROW], &[[3, 2]]).unwrap();
    assert!(apart(&alone, &turned) > 1e-4);
    pixels[ROW / 2 - 1] ^= 128;
    let other = embedded(&pixels[..ROW], &grids[..1]).unwrap();
    assert!(apart(&alone, &other) > 1e-4);
    for wrong in [&[][..], &[[4, 4]][..]] {
        assert!(embedded(&pixels[..ROW], wrong).is_err(), "{wrong:?}");
    }
    assert!(encoder.canary().unwrap().is_ok());
}

#[test]
fn captions_of_a_tower_that_sees_both_ways_keep_their_padding() {
    let json = format!(
        r#"{{"model_type": "siglip",
            "vision_config": {{{SMALL}, "image_size": 8, "patch_size": 4}},
            "text_config": {{{SMALL}, "max_position_embeddings": 30, "vocab_size": 64}}}}"#
    );
    let config = ModelConfig::parse(json.as_bytes()).unwrap();
    assert_eq!(apart(&config, 1, 0), (0.0, 30));
}
