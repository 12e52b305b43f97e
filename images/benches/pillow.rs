//! Decoding and resizing beside Pillow, one thread each, in one run, as ratios: `make
//! bench-images`.
//!
//! Needs a Python with Pillow and NumPy, named by SUPERBATCH_PYTHON.
use std::{fs, path::Path, process::Command, time::Instant};
use superbatch_images::{Axis, Filter, ImageLimits, Taps, decode, resize};

const LIMITS: ImageLimits = ImageLimits {
    pixels_max: 1 << 26,
    bytes_max: 1 << 26,
};
/// Each is measured so often, in turns, and its best time counts, so that other load matters less.
const ROUNDS: usize = 5;
const REPEATS: usize = 20;
const SIDE: u32 = 224;

fn main() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let python =
        std::env::var("SUPERBATCH_PYTHON").expect("SUPERBATCH_PYTHON names a Python with Pillow");
    let peer = |words: &[&str]| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/pillow.py");
        let out = Command::new(&python)
            .arg(script)
            .arg(words[0])
            .arg(folder.path())
            .args(&words[1..])
            .output();
        let out = out.expect("Python runs");
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8(out.stdout).expect("text")
    };
    let names = peer(&["write"]);
    println!(
        "one thread, bicubic to {SIDE}x{SIDE}, milliseconds an image; Pillow {}",
        peer(&["version"]).trim()
    );
    for name in names.lines() {
        let bytes = fs::read(folder.path().join(name)).expect("the file was written");
        let (mut ours, mut theirs) = ([f64::INFINITY; 2], [f64::INFINITY; 2]);
        for _ in 0..ROUNDS {
            ours = least(ours, measure(&bytes));
            let said = peer(&["measure", name, &SIDE.to_string(), &REPEATS.to_string()]);
            let said: Vec<f64> = said
                .split_whitespace()
                .map(|word| word.parse().expect("a number"))
                .collect();
            theirs = least(theirs, [said[0], said[1]]);
        }
        let line = |what, k: usize| {
            let [ours, theirs] = [ours[k], theirs[k]].map(|seconds| seconds * 1e3);
            println!(
                "{name:24} {what:6} {ours:7.2}  Pillow {theirs:7.2}  {:.2} x Pillow's speed",
                theirs / ours
            );
        };
        line("decode", 0);
        line("resize", 1);
    }
}

fn least(a: [f64; 2], b: [f64; 2]) -> [f64; 2] {
    [a[0].min(b[0]), a[1].min(b[1])]
}

/// Seconds to decode, and to resize.
fn measure(bytes: &[u8]) -> [f64; 2] {
    let mut best = [f64::INFINITY; 2];
    for _ in 0..REPEATS {
        let began = Instant::now();
        let image = decode(bytes, &LIMITS).expect("it is an image");
        let decoded = began.elapsed();
        let taps = |source| {
            Taps::new(
                Filter::Bicubic,
                &Axis {
                    source,
                    resized: u64::from(SIDE),
                    kept: 0..u64::from(SIDE),
                },
            )
        };
        std::hint::black_box(resize(
            image.as_raw(),
            &taps(image.height()),
            &taps(image.width()),
        ));
        best = least(
            best,
            [
                decoded.as_secs_f64(),
                (began.elapsed() - decoded).as_secs_f64(),
            ],
        );
    }
    best
}
