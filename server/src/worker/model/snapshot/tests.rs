use super::*;
use crate::worker::model::parameters::Init;
use half::{bf16, f16};

fn parameters() -> Parameters {
    let mut parameters = Parameters::default();
    parameters.add("a.weight", &[2, 3], Init::Constant(0.0));
    parameters.add("b.bias", &[2], Init::Constant(0.0));
    parameters.add("scale", &[], Init::Constant(0.0));
    parameters
}

type Row = (&'static str, Dtype, Vec<usize>, Vec<u8>);

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn good() -> Vec<Row> {
    vec![
        (
            "a.weight",
            Dtype::F32,
            vec![2, 3],
            f32s(&[1.0, -2.0, 3.0e38, 0.0, -0.0, 1e-40]),
        ),
        ("b.bias", Dtype::BF16, vec![2], vec![0, 0, 0x80, 0x3f]),
        (
            "scale",
            Dtype::F16,
            vec![],
            f16::from_f32(2.5).to_le_bytes().to_vec(),
        ),
    ]
}

fn file(rows: &[Row]) -> Bytes {
    write(
        rows.iter()
            .map(|(name, dtype, shape, bytes)| (*name, *dtype, shape.as_slice(), bytes.as_slice())),
    )
    .unwrap()
}

fn verdict(rows: &[Row]) -> Result<(), Refusal> {
    Snapshot::parse(vec![file(rows)])?.check(&parameters())
}

#[test]
fn good_weights_pass_and_are_found_by_name() {
    let bytes = file(&good());
    let snapshot = Snapshot::parse(vec![bytes.clone()]).unwrap();
    snapshot.check(&parameters()).unwrap();
    assert_eq!(snapshot.digest(), blake3::hash(&bytes).to_hex().as_str());
    for (name, dtype, shape, bytes) in &good() {
        let stored = snapshot.get(name).unwrap();
        assert_eq!(
            (stored.dtype, stored.shape, stored.bytes),
            (*dtype, shape.as_slice(), bytes.as_slice())
        );
    }
}

#[test]
fn buffers_are_ignored() {
    let mut rows = good();
    rows.push((
        "text_model.embeddings.position_ids",
        Dtype::I64,
        vec![1, 1],
        vec![0; 8],
    ));
    verdict(&rows).unwrap();
}

#[test]
fn shards_make_one_snapshot() {
    let rows = good();
    let snapshot = Snapshot::parse(vec![file(&rows[..1]), file(&rows[1..])]).unwrap();
    snapshot.check(&parameters()).unwrap();
    assert_eq!(snapshot.get("scale").unwrap().bytes, rows[2].3);
    let twice = Snapshot::parse(vec![file(&rows[..1]), file(&rows)]).unwrap_err();
    assert_eq!(twice.tensor.as_deref(), Some("a.weight"));
}

#[test]
fn names_that_do_not_fit_are_counted_or_their_wrapper_is_named() {
    let wrapped: Vec<Row> = good()
        .into_iter()
        .map(|(name, dtype, shape, bytes)| {
            let outer = ["a.weight", "b.bias", "scale"]
                .into_iter()
                .zip(["module.a.weight", "module.b.bias", "module.scale"])
                .find(|(inner, _)| *inner == name)
                .unwrap();
            (outer.1, dtype, shape, bytes)
        })
        .collect();
    let refusal = verdict(&wrapped).unwrap_err();
    assert!(
        refusal.message.contains("begin with 'module.'"),
        "{}",
        refusal.message
    );
    let mut other = good()[2..].to_vec();
    other.push(("c.weight", Dtype::F32, vec![1], vec![0; 4]));
    let refusal = verdict(&other).unwrap_err();
    let said = "in all 2 tensors are missing and 1 are not this model's, such as b.bias, c.weight";
    assert!(refusal.message.contains(said), "{}", refusal.message);
    let wide: Vec<u8> = [0.5, -1e30]
        .iter()
        .flat_map(|x: &f64| x.to_le_bytes())
        .collect();
    let mut double = good();
    double[1] = ("b.bias", Dtype::F64, vec![2], wide);
    assert!(verdict(&double).is_ok());
}

#[test]
fn the_first_bad_tensor_by_name_is_refused() {
    let change = |at: usize, row: Row| {
        let mut rows = good();
        rows[at] = row;
        rows
    };
    let nan = |bits: u16| vec![0, 0, bits.to_le_bytes()[0], bits.to_le_bytes()[1]];
    let mut two_bad = change(0, ("a.weight", Dtype::F32, vec![3, 2], vec![0; 24]));
    two_bad.retain(|row| row.0 != "scale");
    let mut extra = good();
    extra.push(("b.extra", Dtype::F32, vec![1], vec![0; 4]));
    let cases: Vec<(Vec<Row>, &str, &str)> = vec![
        (
            good()[1..].to_vec(),
            "a.weight",
            "is missing; expected shape [2, 3]",
        ),
        (extra, "b.extra", "is not one of this model's"),
        (two_bad, "a.weight", "has shape [3, 2]; expected [2, 3]"),
        (
            change(2, ("scale", Dtype::F32, vec![2], vec![0; 8])),
            "scale",
            "has shape [2]; expected []",
        ),
        (
            change(1, ("b.bias", Dtype::F8_E4M3, vec![2], vec![0; 2])),
            "b.bias",
            "has dtype F8_E4M3; expected F64, F32, F16 or BF16: save model.float()",
        ),
        (
            change(
                1,
                (
                    "b.bias",
                    Dtype::F64,
                    vec![2],
                    [1.5, f64::NAN]
                        .iter()
                        .flat_map(|x| x.to_le_bytes())
                        .collect(),
                ),
            ),
            "b.bias",
            "element 1 of 2",
        ),
        (
            change(
                0,
                (
                    "a.weight",
                    Dtype::F32,
                    vec![2, 3],
                    f32s(&[0.0, 0.0, 0.0, 0.0, f32::NAN, 0.0]),
                ),
            ),
            "a.weight",
            "element 4 of 6",
        ),
        (
            change(
                0,
                (
                    "a.weight",
                    Dtype::F32,
                    vec![2, 3],
                    f32s(&[f32::NEG_INFINITY, 0.0, 0.0, 0.0, 0.0, 0.0]),
                ),
            ),
            "a.weight",
            "element 0 of 6",
        ),
        (
            change(
                1,
                ("b.bias", Dtype::BF16, vec![2], nan(bf16::NAN.to_bits())),
            ),
            "b.bias",
            "element 1 of 2",
        ),
        (
            change(
                1,
                ("b.bias", Dtype::F16, vec![2], nan(f16::INFINITY.to_bits())),
            ),
            "b.bias",
            "element 1 of 2",
        ),
    ];
    for (rows, tensor, problem) in cases {
        let refusal = verdict(&rows).unwrap_err();
        assert_eq!(refusal.tensor.as_deref(), Some(tensor));
        assert!(refusal.message.contains(problem), "{}", refusal.message);
        let error = refusal.into_error(Reason::WeightsRefused, "a push");
        assert_eq!(
            (error.reason(), error.value("tensor")),
            (Reason::WeightsRefused, Some(tensor))
        );
    }
}

#[test]
fn broken_files_are_refused_clearly() {
    let whole = file(&good());
    let mut gap = whole.to_vec();
    let offsets = whole
        .windows(7)
        .position(|w| w == b"[0,24],")
        .or_else(|| whole.windows(6).position(|w| w == b"[0,24]"));
    let offsets = offsets.expect("the first tensor's offsets are in the header");
    gap[offsets + 1] = b'4';
    let cases = [
        (Bytes::new(), "empty or truncated"),
        (whole.slice(..5), "empty or truncated"),
        (whole.slice(..40), "truncated, or no safetensors"),
        (whole.slice(..whole.len() - 1), "truncated, or written over"),
        (
            [&whole[..], b"x"].concat().into(),
            "truncated, or written over",
        ),
        (
            Bytes::from_static(b"PK\x03\x04 a pickle in a zip file, as torch.save makes"),
            "over 100 MB",
        ),
        (
            [&8u64.to_le_bytes()[..], b"not json"].concat().into(),
            "header is corrupt",
        ),
        (gap.into(), "corrupt header"),
    ];
    for (bytes, problem) in cases {
        let refusal = Snapshot::parse(vec![bytes]).unwrap_err();
        assert!(
            refusal.message.contains(problem),
            "'{}' should say '{problem}'",
            refusal.message
        );
    }
}
