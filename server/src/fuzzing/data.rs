//! Data sets: files that people make, and the texts by which they name them.
use super::{Input, opened, put, read, stores, wait};
use crate::{
    bounds::{EXPANSION_MAX, GLOBS_MAX},
    dataset::{
        Manifest, SourceManifest, SourceRequest,
        filter::expression::{Expression, Literal, Name, Operator},
        index, parse_predicate,
        pattern::{self, Keys, Pattern},
    },
    error::Error,
    storage::{StorageConfig, Stores, can_hold_state},
    worker::BlockReader,
};
use arrow::{
    array::{
        Array, ArrayRef, BinaryArray, Int64Array, ListArray, RecordBatch, StringArray, StructArray,
    },
    datatypes::Int32Type,
};
use base64::prelude::{BASE64_STANDARD, Engine as _};
use parquet::{
    arrow::{ARROW_SCHEMA_META_KEY, ArrowWriter, arrow_writer::ArrowWriterOptions},
    basic::Compression,
    file::{metadata::KeyValue, properties::WriterProperties},
};
use std::sync::Arc;
use superbatch_proto::v1::Reason;

/// Blocks of a manifest that are read; more of them do nothing new.
const BLOCKS_READ: usize = 4;
const RECORD: usize = 512;
/// Where images by path lie. A path that leads nowhere else finds one image there.
const IMAGES: &str = "memory:///images";
const IMAGE: &str = "a.jpg";
/// What an allow-list of the URI's target has.
const ALLOWED: &str = "memory:///data";

/// Changes what is asked of a file by the bits of a byte.
fn asked(how: u8, entry: impl Fn(&str) -> String) -> SourceRequest {
    let mut request = SourceRequest::new("memory:///data");
    if how & 2 != 0 {
        request.caption_column = Some(entry("caption"));
    }
    if how & 4 != 0 {
        let [n, text] = ["n", "caption"].map(|name| format!("\"{}\"", entry(name)));
        request.predicate = Some(format!("{n} >= 1 or {text} is null or not {n} in (7, 2.5)"));
    }
    if how & 8 != 0 {
        request.caption_seed = Some(7);
    }
    if how & 16 != 0 {
        request.image_root = Some(IMAGES.to_owned());
    }
    request
}

/// A tar after a byte that says what is asked of it. With its lowest bit 0 the headers' checksums
/// are made right: no change of another byte would get past them.
pub fn tar(bytes: &[u8]) {
    let mut input = Input(bytes);
    let how = input.byte();
    let mut file = input.0.to_vec();
    if how & 1 == 0 {
        mend_checksums(&mut file);
    }
    let request = asked(how, |entry| format!("json[{entry}]"));
    read_all("0.tar", &file, &request, &["__key__", "json[n]"]);
}

fn mend_checksums(file: &mut [u8]) {
    for header in file.as_chunks_mut::<RECORD>().0 {
        if header[257..262] != *b"ustar" {
            continue;
        }
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    }
}

/// A Parquet file after a byte that says what is asked of it; or the Arrow schema that a file holds
/// beside Parquet's own, in base64, where no change of a byte would get to it.
pub fn parquet(bytes: &[u8]) {
    const OF_SCHEMA: u8 = 32;
    let mut input = Input(bytes);
    let how = input.byte();
    let request = asked(how, str::to_owned);
    if how & OF_SCHEMA == 0 {
        read_all("0.parquet", input.0, &request, &[]);
    } else {
        read_all("0.parquet", &with_schema(input.0), &request, &[]);
    }
}

/// Returns a file of a few columns which says that it was written of this Arrow schema.
fn with_schema(schema: &[u8]) -> Vec<u8> {
    let numbers: ArrayRef = Arc::new(Int64Array::from_iter_values([1, 2]));
    let columns: [(&str, ArrayRef); 5] = [
        ("jpg", Arc::new(BinaryArray::from_vec(vec![b"one", b"two"]))),
        ("caption", Arc::new(StringArray::from(vec!["a", "b"]))),
        ("n", numbers.clone()),
        ("both", Arc::new(StructArray::from(rows([("n", numbers)])))),
        (
            "list",
            Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>([
                Some([Some(1), None]),
                None,
            ])),
        ),
    ];
    let batch = rows(columns);
    let said = KeyValue::new(
        ARROW_SCHEMA_META_KEY.to_owned(),
        BASE64_STANDARD.encode(schema),
    );
    let properties = WriterProperties::builder()
        .set_compression(Compression::UNCOMPRESSED)
        .set_key_value_metadata(Some(vec![said]));
    let options = ArrowWriterOptions::new()
        .with_properties(properties.build())
        .with_skip_arrow_metadata(true);
    let mut file = Vec::new();
    let writer = ArrowWriter::try_new_with_options(&mut file, batch.schema(), options);
    let mut writer = writer.expect("a schema that Parquet can hold");
    writer.write(&batch).expect("memory takes a file");
    writer.close().expect("memory takes a file");
    file
}

fn rows<const N: usize>(columns: [(&str, ArrayRef); N]) -> RecordBatch {
    RecordBatch::try_from_iter(columns).expect("columns of one length")
}

/// Indexes a file, and reads its blocks as a worker does.
fn read_all(name: &str, file: &[u8], request: &SourceRequest, columns: &[&str]) {
    let stores = stores();
    let state = opened(&stores, "memory:///state");
    wait(async {
        put(&opened(&stores, "memory:///data"), name, file).await;
        put(&opened(&stores, IMAGES), IMAGE, b"image").await;
        let sources = std::slice::from_ref(request);
        let Some(manifest) = read(index(&stores, Some(&state), sources).await) else {
            return;
        };
        check_manifest(&manifest);
        let source = &manifest.sources[0];
        let columns = deliverable(&manifest, source, columns);
        let reader = BlockReader::new(stores.clone(), 0).keeping(state.clone());
        for (shard, number, block) in source.blocks().take(BLOCKS_READ) {
            let (start, end) = block.bytes;
            // A tar that was cut off may lack the padding of its last member.
            let whole = file.len().next_multiple_of(RECORD) as u64;
            assert!(start <= end && end <= whole, "{block:?}");
            if block.rows == 0 {
                continue;
            }
            let rows = reader.read(&manifest, 0, shard, number, &columns).await;
            let is_changed = |error: &Error| error.reason() == Reason::DatasetChanged;
            assert!(!rows.as_ref().is_err_and(is_changed), "nothing changed");
            if let Some(rows) = read(rows) {
                assert_eq!(rows.batch.num_rows(), block.rows as usize);
                check_arrays(&rows.batch);
                let all: Vec<u32> = (0..block.rows).collect();
                let images = read(reader.with_images(&rows, &all).await);
                for piece in images.into_iter().flatten() {
                    check_arrays(&piece.batch);
                }
            }
            let places = reader.image_places(&manifest, 0, shard, number, &columns);
            let places = read(places.await).into_iter().flatten();
            let mut ranges = places.filter_map(|place| place.bytes);
            assert!(ranges.all(|range| range.end <= file.len() as u64));
        }
    });
}

/// A manifest comes back from its JSON, and its masks are those of its blocks.
fn check_manifest(manifest: &Manifest) {
    let json = serde_json::to_vec(manifest).expect("plain data encodes");
    let again: Manifest = serde_json::from_slice(&json).expect("it was written just now");
    assert!(again == *manifest, "a manifest differs from its own JSON");
    for (_, _, block) in manifest.sources[0].blocks().take(BLOCKS_READ) {
        let kept = block.mask.as_ref().map(|mask| mask.count());
        assert!(kept.is_none_or(|kept| kept == block.rows), "{block:?}");
    }
}

/// Returns the first columns of a source that can be delivered, and those of `more`.
fn deliverable(manifest: &Manifest, source: &SourceManifest, more: &[&str]) -> Vec<String> {
    let own = source.columns.iter().map(|column| column.name.as_str());
    let names = more.iter().copied().chain(own.take(4));
    let mut columns = Vec::new();
    for name in names {
        columns.push(name.to_owned());
        if manifest.data_schema(&columns).is_err() {
            columns.pop();
        }
    }
    columns
}

/// Arrays whose offsets, nulls or texts are not what Arrow promises would be read out of bounds.
fn check_arrays(rows: &RecordBatch) {
    for column in rows.columns() {
        let valid = column.to_data().validate_full();
        valid.expect("an array that was read is a valid one");
    }
}

/// After a byte that says which: a list of ids as NumPy or Parquet file, or a list of URIs.
pub fn lists(bytes: &[u8]) {
    let mut input = Input(bytes);
    let name = ["ids.npy", "ids.parquet", "uris.txt"][usize::from(input.byte()) % 3];
    let stores = stores();
    let uri = format!("memory:///lists/{name}");
    let request = match name {
        "uris.txt" => SourceRequest::new(&uri),
        _ => SourceRequest {
            allow: Some(uri),
            ..SourceRequest::new("memory:///data")
        },
    };
    wait(async {
        put(&opened(&stores, "memory:///lists"), name, input.0).await;
        // The list is read before the data's own files are.
        put(&opened(&stores, "memory:///data"), "0.parquet", b"PAR1").await;
        read(index(&stores, None, &[request]).await);
    });
}

/// A source's URI. What an allow-list lets pass names nothing beyond it.
pub fn uri_pattern(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    read(can_hold_state(&text));
    let Some(found) = read(pattern::parse(&text, pattern::parts(&text))) else {
        return;
    };
    let (mut names, mut globs) = (0, 0);
    for part in &found.parts {
        match &part.keys {
            Keys::Folder => {}
            Keys::Exact(keys) => {
                names += keys.len();
                assert!(keys.is_sorted_by(|a, b| a < b), "each name once");
            }
            Keys::Globs(all) => {
                globs += all.len();
                all.iter().take(8).for_each(|glob| check_glob(glob, &text));
            }
        }
    }
    assert!(names <= EXPANSION_MAX && globs <= GLOBS_MAX);
    let allowed = Stores::new(StorageConfig {
        allow_uris: vec![ALLOWED.to_owned()],
        ..Default::default()
    });
    if pattern::parts(&text).all(|part| allowed.allow(part).is_ok()) {
        check_within(&found);
    }
}

fn check_within(found: &Pattern) {
    let below = found.root_uri.strip_prefix(ALLOWED);
    let is_below = below.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    assert!(is_below, "{} is not below {ALLOWED}", found.root_uri);
    let leaves = |path: &str| path.split('/').any(|segment| segment == "..");
    for part in &found.parts {
        assert!(!leaves(&part.folder), "{part:?}");
        if let Keys::Exact(keys) | Keys::Globs(keys) = &part.keys {
            assert!(!keys.iter().any(|key| leaves(key)), "{part:?}");
        }
    }
}

fn check_glob(glob: &str, other: &str) {
    // Each sign but a set stands for itself, too.
    assert!(glob.contains('[') || pattern::matches(glob, glob), "{glob}");
    pattern::matches(glob, other);
}

/// A `where`, which printed and parsed again must be the same.
pub fn predicate(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let parsed = match parse_predicate(&text) {
        Ok(parsed) => parsed,
        Err(fault) => {
            let places = 1..=text.chars().count() + 1;
            assert!(places.contains(&fault.at), "{fault:?}");
            return;
        }
    };
    let none = |_: &str| None;
    parsed.outcome(&none);
    let printed = print(&parsed);
    match parse_predicate(&printed) {
        Ok(again) => assert_eq!(print(&again), printed, "of {text}"),
        // It has parentheses, and spaces, where the text had none.
        Err(fault) => assert!(
            fault.what.contains("inside each other") || fault.what.contains("bytes"),
            "{fault:?} in {printed}"
        ),
    }
}

fn print(expression: &Expression) -> String {
    let of = |name: &Name| format!("\"{}\"", name.name.replace('"', "\"\""));
    // What stands beside an operator that binds more closely is put into parentheses.
    let within = |side: &Expression| match side {
        Expression::And(_) | Expression::Or(_) => format!("({})", print(side)),
        _ => print(side),
    };
    match expression {
        Expression::And(both) => match &both[0] {
            Expression::Or(_) => format!("{} and {}", within(&both[0]), within(&both[1])),
            left => format!("{} and {}", print(left), within(&both[1])),
        },
        Expression::Or(both) => match &both[1] {
            Expression::Or(_) => format!("{} or {}", print(&both[0]), within(&both[1])),
            right => format!("{} or {}", print(&both[0]), print(right)),
        },
        Expression::Not(inner) => format!("not {}", within(inner)),
        Expression::Compare(name, operator, literal) => {
            let sign = match operator {
                Operator::Equal => "=",
                Operator::NotEqual => "<>",
                Operator::Less => "<",
                Operator::LessOrEqual => "<=",
                Operator::Greater => ">",
                Operator::GreaterOrEqual => ">=",
            };
            format!("{} {sign} {}", of(name), value(literal))
        }
        Expression::In(name, literals) => {
            let all: Vec<String> = literals.iter().map(value).collect();
            format!("{} in ({})", of(name), all.join(", "))
        }
        Expression::IsNull(name) => format!("{} is null", of(name)),
    }
}

fn value(literal: &Literal) -> String {
    match literal {
        // With its point, or it would be read as a whole number.
        Literal::Float(real) => format!("{real:?}"),
        other => other.to_string(),
    }
}
