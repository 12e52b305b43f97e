//! Joint selection by the native backend against its peers, in one run, as ratios: `make
//! bench-kernels`.
//!
//! Arguments: none (the table), `growth FILE` (processor time and memory by super-batch size),
//! `scale` (163,840 candidates), `chunks` (what more chunks buy). Peers need a Python with NumPy,
//! PyTorch and safetensors, named by SUPERBATCH_PYTHON; without it they are left out.
mod common;
mod memory;

use common::{BIAS, SCALES, World};
use half::f16;
use safetensors::{Dtype, tensor::TensorView};
use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Instant,
};
use superbatch_kernels::{Backend, Candidates, Loss, Noise, Policy, Selection, Settings, noise};

const COUNT: usize = 8_192;
const DIM: usize = 512;
const SUB_BATCH: usize = 1_638;
const N_CHUNKS: usize = 16;
/// Each is measured so often, in turns, and its best time counts, so that other load matters less.
const ROUNDS: usize = 5;

fn main() {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => table(),
        ["growth", file] => growth(Path::new(file)),
        ["scale"] => scale(),
        ["chunks"] => chunks(),
        _ => panic!("unknown arguments {words:?}"),
    }
}

/// Seconds, and processor seconds of all threads: if others use the machine too, these are what
/// can be compared.
#[derive(Clone, Copy)]
struct Times {
    wall: f64,
    busy: f64,
}

impl Times {
    const NEVER: Self = Self {
        wall: f64::INFINITY,
        busy: f64::INFINITY,
    };

    fn least(self, other: Self) -> Self {
        Self {
            wall: self.wall.min(other.wall),
            busy: self.busy.min(other.busy),
        }
    }

    /// How many times as long `other` takes.
    fn of(self, other: Self) -> String {
        format!(
            "{:.1} x native's time, {:.1} x its processor time",
            other.wall / self.wall,
            other.busy / self.busy
        )
    }
}

/// Processor time of this process, to a hundredth of a second (Linux; elsewhere 0).
fn busy() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    after_name
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|ticks| ticks.parse::<f64>().ok())
        .sum::<f64>()
        / 100.0
}

fn select(
    candidates: &Candidates<'_>,
    settings: &Settings,
    noise: &Noise<'_>,
) -> (Times, Selection) {
    let (begun, before) = (Instant::now(), busy());
    let selection = Backend::Native
        .select(candidates, settings, noise)
        .expect("valid inputs");
    (
        Times {
            wall: begun.elapsed().as_secs_f64(),
            busy: busy() - before,
        },
        selection,
    )
}

/// A Python process that holds the same super-batch and answers with times and draws.
struct Peers {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Peers {
    fn start(file: &Path, threads: usize) -> Option<Self> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers.py");
        let python = std::env::var_os("SUPERBATCH_PYTHON")?;
        let threads = threads.to_string();
        let mut command = Command::new(python);
        command
            .arg(script)
            .arg("serve")
            .arg(file)
            .arg(&threads)
            .env("OMP_NUM_THREADS", &threads);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a Python to run");
        let to = child.stdin.take().expect("piped");
        let from = BufReader::new(child.stdout.take().expect("piped"));
        let mut peers = Self { child, to, from };
        assert_eq!(peers.line(), "ready");
        Some(peers)
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.from.read_line(&mut line).expect("an answer");
        line.trim().to_owned()
    }

    /// Times, and the draw.
    fn ask(&mut self, question: &str) -> (Times, Vec<u32>) {
        writeln!(self.to, "{question}").expect("a peer that listens");
        let line = self.line();
        let mut words = line.split(' ');
        let mut time = || {
            words
                .next()
                .and_then(|word| word.parse().ok())
                .expect("two times first")
        };
        let times = Times {
            wall: time(),
            busy: time(),
        };
        (
            times,
            words.map(|word| word.parse().expect("an index")).collect(),
        )
    }

    fn end(mut self) {
        drop(self.to);
        self.child.wait().expect("a peer that ends");
    }
}

/// Writes the super-batch where the peers can read it.
fn write(world: &World<f32>, noise: &[f32], settings: &Settings) -> PathBuf {
    let bytes = |values: &[f32]| {
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let names = [
        "learner_img",
        "learner_txt",
        "reference_img",
        "reference_txt",
        "noise",
    ];
    let data: Vec<Vec<u8>> = world
        .towers
        .iter()
        .map(|tower| bytes(tower))
        .chain([bytes(noise)])
        .collect();
    let shapes = [[world.count, world.dim]; 4]
        .into_iter()
        .chain([[settings.n_chunks, world.count]]);
    let view = |(shape, data): ([usize; 2], _)| {
        TensorView::new(Dtype::F32, shape.to_vec(), data).expect("a tensor")
    };
    let tensors = names
        .into_iter()
        .zip(shapes.zip(data.iter().map(Vec::as_slice)).map(view));
    let words = [
        ("learner_scale", SCALES[0].to_string()),
        ("reference_scale", SCALES[1].to_string()),
        ("learner_bias", BIAS.to_string()),
        ("reference_bias", BIAS.to_string()),
        ("b", settings.sub_batch_size.to_string()),
    ];
    let words: HashMap<String, String> = words.map(|(key, value)| (key.to_owned(), value)).into();
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("peers.safetensors");
    safetensors::serialize_to_file(tensors, Some(words), &path).expect("room for the super-batch");
    path
}

/// How many of `ours` a peer drew too.
fn agreement(ours: &[u32], theirs: &[u32]) -> String {
    let same = ours.iter().filter(|index| theirs.contains(index)).count();
    format!("{same} of {} rows drawn by both", ours.len())
}

fn table() {
    let world = World::f32(COUNT, DIM);
    let settings = Settings {
        sub_batch_size: SUB_BATCH,
        n_chunks: N_CHUNKS,
        ..Settings::default()
    };
    let streams: Vec<_> = (0..N_CHUNKS as u32)
        .map(|k| noise::Stream::new(1, 0, 0, k))
        .collect();
    let given: Vec<f32> = streams
        .iter()
        .flat_map(|stream| (0..COUNT as u64).map(|key| stream.gumbel(key) as f32))
        .collect();
    let noise = Noise::Given(&given);
    let file = write(&world, &given, &settings);
    let threads = rayon::current_num_threads();
    let mut peers = Peers::start(&file, threads);
    println!(
        "B={COUNT} b={SUB_BATCH} d={DIM} chunks={N_CHUNKS} f32, learnability, {threads} threads, \
        best of {ROUNDS}"
    );

    let mut best: By<Times> = HashMap::new();
    let mut drawn: By<Vec<u32>> = HashMap::new();
    let (mut flops, mut gemm) = (HashMap::new(), Times::NEVER);
    for round in 0..ROUNDS {
        for loss in Loss::ALL {
            let mut keep = |who, (times, indices): (Times, Vec<u32>)| {
                let entry = best.entry((loss.as_str(), who)).or_insert(Times::NEVER);
                *entry = entry.least(times);
                drawn.insert((loss.as_str(), who), indices);
            };
            let (times, ours) = select(
                &world.candidates(),
                &Settings {
                    loss: *loss,
                    ..settings.clone()
                },
                &noise,
            );
            keep("native", (times, ours.indices));
            flops.insert(loss.as_str(), ours.flops);
            let Some(peers) = &mut peers else { continue };
            gemm = gemm.least(peers.ask("gemm").0);
            keep("torch", peers.ask(loss.as_str()));
            if *loss == Loss::Sigmoid && round < 2 {
                keep("printed", peers.ask("printed"));
                keep("blas", peers.ask("blas"));
            }
        }
    }
    report(&best, &drawn, &flops, gemm);
    if let Some(peers) = peers {
        peers.end();
    }
}

type By<T> = HashMap<(&'static str, &'static str), T>;

/// Prints times and ratios, by loss and who took them. `gemm` is for 10^12 operations of the
/// machine's matrix product.
fn report(best: &By<Times>, drawn: &By<Vec<u32>>, flops: &HashMap<&str, f64>, gemm: Times) {
    let measured = gemm.wall.is_finite();
    if measured {
        println!(
            "f32 GEMM: {:.1} GFLOP/s, {:.1} a processor second",
            1e3 / gemm.wall,
            1e3 / gemm.busy
        );
    }
    let called = [
        ("printed", "dense NumPy, Algorithm 1 as printed"),
        ("blas", "dense NumPy, Algorithm 1 with its sums by BLAS"),
        ("torch", "matrix-free PyTorch"),
    ];
    for loss in Loss::ALL.iter().map(|loss| loss.as_str()) {
        let (ours, work) = (best[&(loss, "native")], flops[loss] / 1e12);
        let share = |gemm: f64, ours: f64| 100.0 * work * gemm / ours;
        let share = if measured {
            format!(
                ", {:.0} % of GEMM ({:.0} %)",
                share(gemm.wall, ours.wall),
                share(gemm.busy, ours.busy)
            )
        } else {
            String::new()
        };
        let rate = 1e3 * work / ours.wall;
        println!(
            "{loss}, native: {:.3} s ({:.2} processor seconds), {rate:.1} GFLOP/s{share}",
            ours.wall, ours.busy
        );
        if measured {
            ratio(
                &format!("{loss}: rate of the f32 matrix product"),
                work * gemm.busy / ours.busy,
            );
        }
        for (who, name) in called {
            if let Some(theirs) = best.get(&(loss, who)) {
                ratio(&format!("{loss}: speed of {name}"), theirs.busy / ours.busy);
                let agreement = agreement(&drawn[&(loss, "native")], &drawn[&(loss, who)]);
                println!(
                    "{loss}, {name}: {:.3} s, {}; {agreement}",
                    theirs.wall,
                    ours.of(*theirs)
                );
            }
        }
    }
    let [sigmoid, softmax] = ["sigmoid", "softmax"].map(|loss| best[&(loss, "native")]);
    println!(
        "softmax / sigmoid: {:.2} ({:.2})",
        softmax.wall / sigmoid.wall,
        softmax.busy / sigmoid.busy
    );
}

/// A line that `make bench` gathers: by processor time, higher is better.
fn ratio(of: &str, value: f64) {
    println!("ratio\tselection, {of}\t{value:.3}");
}

fn seeded(keys: &[u64]) -> Noise<'_> {
    Noise::Seeded {
        seed: 1,
        generation: 0,
        step: 0,
        keys,
    }
}

/// Mean processor seconds of a selection and its memory, by super-batch size.
fn growth(file: &Path) {
    let mut out = String::from(
        "# B b processor-seconds MiB (d=128, f16, 16 chunks, sigmoid, learnability)\n",
    );
    for count in [4, 8, 16, 32, 64, 128].map(|thousands| thousands * 1024) {
        let world = World::f16(count, 128);
        let keys: Vec<u64> = (0..count as u64).collect();
        let settings = Settings {
            sub_batch_size: count / 5,
            n_chunks: N_CHUNKS,
            ..Settings::default()
        };
        let before = memory::reset_peak();
        // Small ones more often: the clock ticks a hundred times a second.
        let rounds = (32 * 1024 / count).pow(2).clamp(1, 32);
        let seconds: f64 = (0..rounds)
            .map(|_| {
                select(&world.candidates(), &settings, &seeded(&keys))
                    .0
                    .busy
            })
            .sum();
        let line = format!(
            "{count} {} {:.4} {:.1}",
            count / 5,
            seconds / rounds as f64,
            memory::peak() - before
        );
        println!("{line}");
        out += &format!("{line}\n");
    }
    fs::write(file, out).expect("a place for the table");
}

/// The paper's real scale. Of 16 chunks two are drawn, so one of the fifteen updates is timed, the
/// most expensive.
fn scale() {
    let (count, chunk, dim) = (163_840, 2_048, 768);
    let world: World<f16> = World::f16(count, dim);
    let keys: Vec<u64> = (0..count as u64).collect();
    for loss in Loss::ALL {
        let settings = Settings {
            loss: *loss,
            sub_batch_size: 2 * chunk,
            n_chunks: 2,
            ..Settings::default()
        };
        let before = memory::reset_peak();
        let (Times { wall: seconds, .. }, selection) =
            select(&world.candidates(), &settings, &seeded(&keys));
        let whole: f64 = (1..16)
            .map(|k| 8.0 * (count - k * chunk) as f64 * chunk as f64 * dim as f64)
            .sum();
        println!(
            "{loss} B={count} chunk={chunk} d={dim} f16: {seconds:.1} s for one update of 15, \
            {:.1} GFLOP/s, {:.0} MiB above \
             the inputs; all 15 at that rate: {:.0} s",
            selection.flops / seconds / 1e9,
            memory::peak() - before,
            whole / (selection.flops / seconds)
        );
    }
}

/// The sub-batch's score by number of chunks (the paper's figure 2), and what it costs.
fn chunks() {
    let world = World::f32(COUNT, DIM);
    let keys: Vec<u64> = (0..COUNT as u64).collect();
    let draw = |settings: Settings, seed| {
        let noise = Noise::Seeded {
            seed,
            generation: 0,
            step: 0,
            keys: &keys,
        };
        let (times, selection) = select(&world.candidates(), &settings, &noise);
        (times, selection.batch_score.expect("given embeddings"))
    };
    let settings = Settings {
        sub_batch_size: SUB_BATCH,
        ..Settings::default()
    };
    let policies = [Policy::Uniform, Policy::Independent, Policy::TopK].map(|policy| (policy, 1));
    let joint = [2, 4, 8, 16, 32, 64]
        .into_iter()
        .flat_map(|n| [(Policy::Joint, n), (Policy::JointTopK, n)]);
    for (policy, n_chunks) in policies.into_iter().chain(joint) {
        let (mut least, mut score) = (Times::NEVER, 0.0);
        for seed in 0..3 {
            let (times, one) = draw(
                Settings {
                    policy,
                    n_chunks,
                    ..settings.clone()
                },
                seed,
            );
            (least, score) = (least.least(times), score + one / 3.0);
        }
        let Times { wall, busy } = least;
        println!(
            "{policy:<12} {n_chunks:>3} chunks: batch score {score:>9.3}, {wall:.3} s ({busy:.2} \
            processor seconds)"
        );
    }
}
