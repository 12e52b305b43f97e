//! Decoding and resizing beside Pillow, one thread each, in one run, as ratios: `make
//! bench-images`.
//!
//! Needs a Python with Pillow and NumPy, named by SUPERBATCH_PYTHON.
use std::{fs, path::Path, process::Command, time::Instant};
use superbatch_images::{Axis, Filter, ImageLimits, Taps, decode, decode_at_least, resize};

const LIMITS: ImageLimits = ImageLimits {
    pixels_max: 1 << 26,
    bytes_max: 1 << 26,
};
/// Each is measured so often, in turns, and its best time counts, so that other load matters less.
const ROUNDS: usize = 5;
const REPEATS: usize = 20;
const SIDE: u32 = 224;
/// As approximate scoring takes them: JPEG files are then decoded at half their size.
const LOW_SIDE: u32 = SIDE / 2;

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
        let (mut low, mut fast) = ([f64::INFINITY; 2], f64::INFINITY);
        for _ in 0..ROUNDS {
            ours = least(ours, measure(&bytes, SIDE));
            low = least(low, measure(&bytes, LOW_SIDE));
            let said = peer(&["measure", name, &SIDE.to_string(), &REPEATS.to_string()]);
            let said: Vec<f64> = said
                .split_whitespace()
                .map(|word| word.parse().expect("a number"))
                .collect();
            theirs = least(theirs, [said[0], said[1]]);
            fast = said.get(2).map_or(fast, |seconds| fast.min(*seconds));
        }
        let line = |what, k: usize| {
            let [ours, theirs] = [ours[k], theirs[k]].map(|seconds| seconds * 1e3);
            println!(
                "{name:24} {what:6} {ours:7.2}  Pillow {theirs:7.2}  {:.2} x Pillow's speed",
                theirs / ours
            );
            // A line that `make bench` gathers.
            println!(
                "ratio\timages, {what} {name}{}: speed of Pillow\t{:.3}{}",
                with(what, name),
                theirs / ours,
                goal(what, name)
            );
        };
        line("decode", 0);
        beside_simplejpeg(name, ours[0], fast);
        line("resize", 1);
        let [full, low] = [ours, low].map(|seconds| seconds.iter().sum::<f64>() * 1e3);
        // Other files are decoded whole for any side.
        if !name.ends_with("jpg") {
            continue;
        }
        println!(
            "{name:24} {:6} {low:7.2}  at {SIDE}  {full:7.2}  {:.2} x the images a second",
            format!("to {LOW_SIDE}"),
            full / low
        );
    }
}

/// Prints how fast a JPEG file is decoded beside simplejpeg, if it is installed.
fn beside_simplejpeg(name: &str, ours: f64, fast: f64) {
    if !fast.is_finite() {
        return;
    }
    let [ours, fast] = [ours, fast].map(|seconds| seconds * 1e3);
    println!(
        "{name:24} {:6} {ours:7.2}  simplejpeg {fast:7.2}  {:.2} x its speed",
        "decode",
        fast / ours
    );
    println!(
        "ratio\timages, decode {name}{}: speed of simplejpeg\t{:.3}",
        with("decode", name),
        fast / ours
    );
}

/// Says whether vector code decodes it, since that is another figure.
fn with(what: &str, name: &str) -> &'static str {
    match (what, name.ends_with("jpg"), cfg!(feature = "jpeg-simd")) {
        ("decode", true, true) => " with nasm",
        ("decode", true, false) => " without nasm",
        _ => "",
    }
}

/// The field of a line that says what is aimed at.
fn goal(what: &str, name: &str) -> &'static str {
    match what {
        "resize" if name.starts_with("640x480") => "\tgoal=4",
        "decode" if cfg!(feature = "jpeg-simd") && name.ends_with("progressive.jpg") => {
            "\tgoal=1.1"
        }
        "decode" if cfg!(feature = "jpeg-simd") && name.ends_with("jpg") => "\tgoal=1.2",
        _ => "",
    }
}

fn least(a: [f64; 2], b: [f64; 2]) -> [f64; 2] {
    [a[0].min(b[0]), a[1].min(b[1])]
}

/// Seconds to decode, and to resize to `side`, as scoring at that side does it.
fn measure(bytes: &[u8], side: u32) -> [f64; 2] {
    let mut best = [f64::INFINITY; 2];
    for _ in 0..REPEATS {
        let began = Instant::now();
        let image = match side {
            LOW_SIDE => decode_at_least(bytes, &LIMITS, side),
            _ => decode(bytes, &LIMITS),
        };
        let image = image.expect("it is an image");
        let decoded = began.elapsed();
        let taps = |source| {
            Taps::new(
                Filter::Bicubic,
                &Axis {
                    source,
                    resized: u64::from(side),
                    kept: 0..u64::from(side),
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
