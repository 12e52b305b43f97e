use crate::{
    decode::decode,
    image::{Error, ImageLimits},
};
use flate2::{Crc, write::ZlibEncoder};
use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};
use std::io::Write;

const ROOMY: ImageLimits = ImageLimits {
    pixels_max: 1 << 20,
    bytes_max: 1 << 24,
};

fn chunk(kind: &[u8], data: &[u8]) -> Vec<u8> {
    let mut sum = Crc::new();
    sum.update(kind);
    sum.update(data);
    let parts = [
        &(data.len() as u32).to_be_bytes()[..],
        kind,
        data,
        &sum.sum().to_be_bytes(),
    ];
    parts.concat()
}

fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A picture 4 wide and 2 high, with chunks before and behind its pixels.
fn png(before: &[u8], pixels: &[u8], behind: &[u8]) -> Vec<u8> {
    let mut header = vec![0, 0, 0, 4, 0, 0, 0, 2, 8, 2, 0, 0, 0];
    header = chunk(b"IHDR", &header);
    let start = b"\x89PNG\r\n\x1a\n".to_vec();
    [
        start,
        header,
        before.to_vec(),
        chunk(b"IDAT", pixels),
        behind.to_vec(),
        chunk(b"IEND", b""),
    ]
    .concat()
}

fn rows(count: usize) -> Vec<u8> {
    let row = [&[0][..], &[200; 12]].concat();
    packed(&row.repeat(count))
}

fn size(bytes: &[u8]) -> Result<(u32, u32), Error> {
    decode(bytes, &ROOMY).map(|image| image.dimensions())
}

const UPRIGHT: Result<(u32, u32), Error> = Ok((4, 2));
const TURNED: Result<(u32, u32), Error> = Ok((2, 4));

/// A TIFF header with an orientation of 6, of the given type.
fn exif(kind: u8) -> Vec<u8> {
    let field = [0x12, 1, kind, 0, 1, 0, 0, 0, 6, 0, 0, 0];
    [&b"II*\0\x08\0\0\0\x01\0"[..], &field, &[0; 4]].concat()
}

#[test]
fn what_pillow_refuses_is_undecodable() {
    assert_eq!(size(&png(b"", &rows(2), b"")), UPRIGHT);
    let mut unsound = chunk(b"iCCP", b"name\0\0x");
    *unsound.last_mut().unwrap() ^= 1;
    let large = [&b"key\0\0"[..], &packed(&vec![0; 2 << 20])].concat();
    let itxt = [&b"key\0\x01\0\0\0"[..], &packed(&vec![0; 2 << 20])].concat();
    let mut wrong_sum = rows(2);
    *wrong_sum.last_mut().unwrap() ^= 1;
    for (bytes, says) in [
        (png(&unsound, &rows(2), b""), "iCCP has a wrong checksum"),
        (
            png(&chunk(b"zTXt", &large), &rows(2), b""),
            "more than 1 MiB",
        ),
        (
            png(b"", &rows(2), &chunk(b"zTXt", &large)),
            "more than 1 MiB",
        ),
        (
            png(&chunk(b"iCCP", &large), &rows(2), b""),
            "more than 1 MiB",
        ),
        (
            png(&chunk(b"zTXt", b"key\0\x05x"), &rows(2), b""),
            "an unknown way",
        ),
        (
            png(&chunk(b"iTXt", &itxt), &rows(2), b""),
            "more than 1 MiB",
        ),
        (png(b"", &wrong_sum, b""), "pixels are damaged"),
    ] {
        let error = size(&bytes).unwrap_err();
        assert!(error.to_string().contains(says), "{says}: {error}");
    }
    // What Pillow lets pass.
    let mut damaged = chunk(b"tEXt", b"a\0b");
    *damaged.last_mut().unwrap() ^= 1;
    for bytes in [
        png(b"", &rows(2), &damaged),
        png(&chunk(b"zTXt", b"a\0\0xxxx"), &rows(2), b""),
        png(b"", &[rows(2), b"xxxx".to_vec()].concat(), b""),
    ] {
        assert_eq!(size(&bytes), UPRIGHT);
    }
}

#[test]
fn orientation_is_found_wherever_pillow_finds_it() {
    let turn = chunk(b"eXIf", &exif(3));
    assert_eq!(size(&png(&turn, &rows(2), b"")), TURNED);
    assert_eq!(size(&png(b"", &rows(2), &turn)), TURNED);
    let hex: String = exif(3).iter().map(|byte| format!("{byte:02x}")).collect();
    for head in ["", "457869660000"] {
        let text = format!("\nexif\n      40\n{head}{}\n{}\n", &hex[..20], &hex[20..]);
        let plain = chunk(
            b"tEXt",
            &[b"Raw profile type exif\0", text.as_bytes()].concat(),
        );
        let small = [&b"Raw profile type exif\0\0"[..], &packed(text.as_bytes())].concat();
        for raw in [plain, chunk(b"zTXt", &small)] {
            assert_eq!(size(&png(&raw, &rows(2), b"")), TURNED);
            assert_eq!(size(&png(b"", &rows(2), &raw)), TURNED);
        }
    }
    let xmp = chunk(
        b"iTXt",
        b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation=\"6\"/>",
    );
    assert_eq!(size(&png(&xmp, &rows(2), b"")), TURNED);
    // What is there and is no orientation is not asked of the XMP again.
    for none in [exif(1), b"garbage!".to_vec()] {
        let both = [chunk(b"eXIf", &none), xmp.clone()].concat();
        assert_eq!(size(&png(&both, &rows(2), b"")), UPRIGHT);
    }
}

#[test]
fn pictures_of_every_kind_and_interlaced_pass() {
    for (kind, channels) in [
        (ExtendedColorType::L8, 1),
        (ExtendedColorType::La8, 2),
        (ExtendedColorType::Rgb8, 3),
        (ExtendedColorType::Rgba16, 8),
    ] {
        let (mut bytes, pixels) = (Vec::new(), vec![7; 40 * 300 * channels]);
        PngEncoder::new(&mut bytes)
            .write_image(&pixels, 40, 300, kind)
            .unwrap();
        assert_eq!(size(&bytes), Ok((40, 300)));
    }
}
