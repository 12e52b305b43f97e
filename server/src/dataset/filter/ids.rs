//! Lists of ids: DataComp's `.npy` files of uids, or a column of Parquet files.
use super::{
    columns::{self, Batches},
    expression::Literal,
    values::{Kind, values},
};
use crate::{
    dataset::{
        file::{self, ShardFile},
        find, layout, pattern,
    },
    error::{Error, Result},
    storage::Stores,
};
use arrow::error::ArrowError;
use std::borrow::Cow;

/// 268 million ids of 16 bytes.
const BYTES_MAX: u64 = 4 << 30;
const IDS_MAX: u64 = BYTES_MAX / 16;
/// How NumPy begins a file.
const MAGIC: &[u8] = b"\x93NUMPY";

/// Ids that are allowed, sorted.
#[derive(Debug)]
pub(super) struct Ids {
    ids: Vec<u128>,
    /// Each is the 32 hexadecimal digits of a uid; otherwise the hash of a text.
    are_uids: bool,
}

impl Ids {
    fn new(mut ids: Vec<u128>, are_uids: bool) -> Self {
        ids.sort_unstable();
        ids.dedup();
        Self { ids, are_uids }
    }

    pub(super) fn len(&self) -> usize {
        self.ids.len()
    }

    pub(super) fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for id in &self.ids {
            hasher.update(&id.to_le_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Returns whether a value is listed. A null is not.
    pub(super) fn hold(&self, value: Option<&Literal>) -> bool {
        let id = match (value, self.are_uids) {
            (None, _) => None,
            (Some(Literal::Text(text)), true) if text.len() == 32 => {
                u128::from_str_radix(text, 16).ok()
            }
            (Some(_), true) => None,
            (Some(value), false) => Some(hashed(value)),
        };
        id.is_some_and(|id| self.ids.binary_search(&id).is_ok())
    }
}

/// Returns a text's hash, or that of a number's digits.
pub(in crate::dataset) fn hashed(value: &Literal) -> u128 {
    let text = match value {
        Literal::Text(text) => Cow::Borrowed(text.as_str()),
        other => Cow::Owned(other.to_string()),
    };
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&blake3::hash(text.as_bytes()).as_bytes()[..16]);
    u128::from_le_bytes(bytes)
}

/// Returns the ids at `uri`: a `.npy` file, or Parquet files with the column `column`, or with one
/// column alone.
///
/// # Errors
/// `InvalidArgument` if it is neither, or too large; `ColumnNotFound`; those of reading.
pub(super) async fn read(stores: &Stores, uri: &str, column: &str) -> Result<Ids> {
    if uri.ends_with(".npy") {
        return npy(stores, uri).await;
    }
    let mut ids = Vec::new();
    let found = find(stores, uri).await?;
    for file in &found.files {
        let before = ids.len();
        let check = |rows: usize| {
            let fits = before.saturating_add(rows) as u64 <= IDS_MAX;
            fits.then_some(()).ok_or_else(|| too_large(uri))
        };
        let more = numbered(file, column, None, check).await?;
        ids.extend(more.into_iter().map(|(id, _)| id));
    }
    not_empty(Ids::new(ids, false), uri)
}

/// Parquet files of ids.
pub(in crate::dataset) struct IdFiles {
    pub files: Vec<ShardFile>,
    /// BLAKE3 of their names, sizes and ETags, in hex.
    pub digest: String,
}

/// # Errors
/// Those of listing.
pub(in crate::dataset) async fn find(stores: &Stores, uri: &str) -> Result<IdFiles> {
    let pattern = pattern::parse(uri, pattern::parts(uri))?;
    let found = find::find(stores, None, pattern, uri).await?;
    let root = stores.open(&found.root_uri)?;
    let (mut files, mut hasher) = (Vec::new(), blake3::Hasher::new());
    for (path, meta) in found.files {
        let etag = file::etag(&root, &meta);
        let size = meta.size.to_string();
        for part in [path.as_str(), &size, etag.as_deref().unwrap_or_default()] {
            hasher.update(part.as_bytes()).update(&[0]);
        }
        files.push(ShardFile::new(root.below(&path), meta.size, etag));
    }
    let digest = hasher.finalize().to_hex().to_string();
    Ok(IdFiles { files, digest })
}

/// Returns the ids of a file, each with its value of the column `value`, which is NaN if it is
/// null. `check` is given the file's number of rows before any is read.
///
/// # Errors
/// Those of `check`; `ColumnNotFound`, `SchemaMismatch`; those of reading.
pub(in crate::dataset) async fn numbered(
    file: &ShardFile,
    column: &str,
    value: Option<&str>,
    check: impl Fn(usize) -> Result<()>,
) -> Result<Vec<(u128, f64)>> {
    let footer = file.footer().await?;
    // What is read is of the groups, whatever the file says of all of them.
    let rows = footer.metadata().row_groups().iter();
    let rows = rows.map(|group| usize::try_from(group.num_rows()).unwrap_or(usize::MAX));
    check(rows.fold(0, usize::saturating_add))?;
    let fields = footer.schema().fields();
    let names: Vec<&str> = fields.iter().map(|field| field.name().as_str()).collect();
    // A tar's key is a column beside it.
    let column = match column {
        "__key__" if !names.contains(&column) => "key",
        column if names.len() == 1 && value.is_none() => names.first().unwrap_or(&column),
        column => column,
    };
    let fits = |name: &str, kinds: &[Kind]| {
        let Ok(field) = footer.schema().field_with_name(name) else {
            let message = format!("{} has no column '{name}'", file.uri());
            return Err(layout::not_found(message, name, &names));
        };
        match Kind::of(field.data_type()) {
            Some(kind) if kinds.contains(&kind) => Ok(()),
            _ => {
                let kind = field.data_type();
                let message = format!("column '{name}' of {} is {kind}", file.uri());
                let wanted = if name == column {
                    "text or whole number"
                } else {
                    "number"
                };
                let message = format!("{message}, no {wanted}");
                Err(layout::mismatch(message, file.uri(), name))
            }
        }
    };
    fits(column, &[Kind::Text, Kind::Int])?;
    if let Some(value) = value {
        fits(value, &NUMBERS)?;
    }
    let groups: Vec<usize> = (0..footer.metadata().num_row_groups()).collect();
    let wanted: Vec<&str> = [Some(column), value].into_iter().flatten().collect();
    let (column, value) = (column.to_owned(), value.map(str::to_owned));
    let look = move |_: usize, batches: &mut Batches| -> Result<Vec<_>, ArrowError> {
        let mut found = Vec::new();
        for batch in batches {
            let batch = batch?;
            let of = |name: &str| match batch.column_by_name(name) {
                Some(array) => values(array),
                None => Ok(Vec::new()),
            };
            let numbers = value.as_deref().map(of).transpose()?.unwrap_or_default();
            for (row, id) in of(&column)?.iter().enumerate() {
                let number = numbers
                    .get(row)
                    .and_then(Option::as_ref)
                    .map_or(f64::NAN, number);
                found.extend(id.iter().map(|id| (hashed(id), number)));
            }
        }
        Ok(found)
    };
    let found = columns::read(file, &footer, &groups, &wanted, look).await?;
    Ok(found.into_iter().flatten().collect())
}

/// Kinds of columns that hold numbers.
pub(in crate::dataset) const NUMBERS: [Kind; 5] = [
    Kind::Int,
    Kind::Float(true),
    Kind::Float(false),
    Kind::Bool,
    Kind::Null,
];

/// Returns a value as a number; a text is none.
pub(in crate::dataset) fn number(value: &Literal) -> f64 {
    match value {
        Literal::Int(whole) => *whole as f64,
        Literal::Float(real) => *real,
        Literal::Bool(truth) => f64::from(u8::from(*truth)),
        Literal::Text(_) => f64::NAN,
    }
}

fn not_empty(ids: Ids, uri: &str) -> Result<Ids> {
    match ids.len() {
        0 => Err(bad(uri, "lists no id")),
        _ => Ok(ids),
    }
}

fn bad(uri: &str, what: &str) -> Error {
    Error::invalid("sources.allow", format!("{uri} {what}")).with("uri", uri)
}

fn too_large(uri: &str) -> Error {
    let what = format!("lists more than {IDS_MAX} ids; split the source");
    bad(uri, &what)
}

/// Pairs of 64 bits, the halves of a uid of 32 hexadecimal digits.
async fn npy(stores: &Stores, uri: &str) -> Result<Ids> {
    let location = stores.open(uri)?;
    let meta = location.head("").await?;
    let size = meta.ok_or_else(|| find::nothing_found(uri, uri))?.size;
    if size > BYTES_MAX {
        return Err(too_large(uri));
    }
    let bytes = location.get("").await?;
    let (rows, data) = header(&bytes).map_err(|what| bad(uri, &what))?;
    if data.len() as u64 != rows.saturating_mul(16) {
        let what = format!("is cut off: {rows} ids do not fit into {size} bytes");
        return Err(bad(uri, &what));
    }
    let id = |pair: &[u8]| {
        let half = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&pair[at..at + 8]);
            u128::from(u64::from_le_bytes(bytes))
        };
        half(0) << 64 | half(8)
    };
    not_empty(Ids::new(data.chunks_exact(16).map(id).collect(), true), uri)
}

/// Returns the number of rows of a NumPy file, and what follows its header.
fn header(bytes: &[u8]) -> Result<(u64, &[u8]), String> {
    let no_npy = || "is no NumPy file".to_owned();
    let rest = bytes.strip_prefix(MAGIC).ok_or_else(no_npy)?;
    let (version, rest) = rest.split_at_checked(2).ok_or_else(no_npy)?;
    let width = if version[0] == 1 { 2 } else { 4 };
    let (length, rest) = rest.split_at_checked(width).ok_or_else(no_npy)?;
    let length = length
        .iter()
        .rev()
        .fold(0, |n, byte| n << 8 | usize::from(*byte));
    let (header, data) = rest.split_at_checked(length).ok_or_else(no_npy)?;
    let header = std::str::from_utf8(header).map_err(|_| no_npy())?;
    let plain: String = header.split_whitespace().collect();
    if !plain.contains("'descr':[('f0','<u8'),('f1','<u8')]") {
        let what = "is no list of uids: its type is not u8,u8 (two numbers of 64 bits), as \
                    DataComp's are";
        return Err(format!("{what}; its header is {}", header.trim_end()));
    }
    let shape = plain.split_once("'shape':(").map(|(_, rest)| rest);
    let rows = shape.and_then(|shape| shape.split_once(",)"));
    let rows = rows.and_then(|(rows, _)| rows.parse().ok());
    let rows = rows.ok_or_else(|| "is no list of uids: it has more than one axis".to_owned())?;
    Ok((rows, data))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let length = (header.len() as u16).to_le_bytes();
        [MAGIC, &[1, 0], &length, header.as_bytes(), data].concat()
    }

    #[test]
    fn only_whole_files_of_pairs_are_read() {
        let good =
            "{'descr': [('f0', '<u8'), ('f1', '<u8')], 'fortran_order': False, 'shape': (2,), }\n";
        let bytes = file(good, &[7; 32]);
        assert_eq!(header(&bytes).unwrap(), (2, &[7; 32][..]));
        let one = "{'descr': '<u8', 'fortran_order': False, 'shape': (2,), }";
        assert!(header(&file(one, &[])).unwrap_err().contains("u8,u8"));
        let square = good.replace("(2,)", "(2, 2)");
        assert!(
            header(&file(&square, &[]))
                .unwrap_err()
                .contains("one axis")
        );
        for cut in 0..bytes.len() - 33 {
            assert!(header(&bytes[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn uids_are_looked_up_by_their_digits() {
        let ids = Ids::new(vec![0xff << 64 | 1, 5], true);
        let text = |text: &str| Literal::Text(text.to_owned());
        assert!(ids.hold(Some(&text("00000000000000ff0000000000000001"))));
        assert!(ids.hold(Some(&text("00000000000000000000000000000005"))));
        assert!(!ids.hold(Some(&text("5"))) && !ids.hold(None));
        let ids = Ids::new(vec![hashed(&text("12"))], false);
        assert!(ids.hold(Some(&Literal::Int(12))) && ids.hold(Some(&text("12"))));
    }
}
