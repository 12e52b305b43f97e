//! Lists of ids: DataComp's `.npy` files of uids, or a column of Parquet files.
use super::{
    columns::{self, Batches},
    expression::Literal,
    values::{Kind, values},
};
use crate::{
    blocking::blocking,
    dataset::{
        file::{self, ShardFile},
        find, layout, pattern,
    },
    error::{Error, Result},
    storage::Stores,
};
use arrow::error::ArrowError;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use std::borrow::Cow;

/// Bytes of an id, in a file of uids as in memory.
const ID_BYTES: u64 = 16;
/// How NumPy begins a file.
const MAGIC: &[u8] = b"\x93NUMPY";
/// Bytes of one read of such a file, and reads at the same time. A piece becomes ids in a few
/// milliseconds.
const PIECE_BYTES: u64 = 8 << 20;
const PIECES_AT_ONCE: usize = 8;

/// Ids that are allowed, sorted.
#[derive(Debug)]
pub(super) struct Ids {
    ids: Vec<u128>,
    digest: String,
    /// Each is the 32 hexadecimal digits of a uid; otherwise the hash of a text.
    are_uids: bool,
}

impl Ids {
    fn new(mut ids: Vec<u128>, are_uids: bool) -> Self {
        ids.sort_unstable();
        ids.dedup();
        let mut hasher = blake3::Hasher::new();
        for id in &ids {
            hasher.update(&id.to_le_bytes());
        }
        Self {
            digest: hasher.finalize().to_hex().to_string(),
            ids,
            are_uids,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.ids.len()
    }

    pub(super) fn digest(&self) -> &str {
        &self.digest
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
/// column alone. They take [`ID_BYTES`] each, and what is read of one file at a time.
///
/// # Errors
/// `InvalidArgument` if it is neither, or takes more memory than the operator gives;
/// `ColumnNotFound`; those of reading.
pub(super) async fn read(stores: &Stores, uri: &str, column: &str) -> Result<Ids> {
    if uri.ends_with(".npy") {
        return npy(stores, uri).await;
    }
    let mut ids = Vec::new();
    let found = find(stores, uri).await?;
    for file in &found.files {
        let before = ids.len();
        let check = |rows: usize| fits(stores, uri, before.saturating_add(rows) as u64);
        let more = numbered(file, column, None, check).await?;
        // No more than they need: a list may take half of the machine's memory.
        ids.reserve_exact(more.len());
        ids.extend(more.into_iter().map(|(id, _)| id));
    }
    sorted(ids, false, uri).await
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

/// Sorting a billion ids takes minutes.
async fn sorted(ids: Vec<u128>, are_uids: bool, uri: &str) -> Result<Ids> {
    if ids.is_empty() {
        return Err(bad(uri, "lists no id"));
    }
    blocking("sorting ids", move || Ok(Ids::new(ids, are_uids))).await
}

fn bad(uri: &str, what: &str) -> Error {
    Error::invalid("sources.allow", format!("{uri} {what}")).with("uri", uri)
}

/// Checks that the operator gives the memory that a list takes.
fn fits(stores: &Stores, uri: &str, ids: u64) -> Result<()> {
    let (bytes, most) = (ids.saturating_mul(ID_BYTES), stores.ids_bytes_max());
    if bytes <= most {
        return Ok(());
    }
    let what = format!(
        "lists {ids} ids, which take {bytes} bytes of memory while the source is indexed, and \
         storage.ids_bytes_max is {most}; raise it where there is memory for that, or list fewer \
         ids"
    );
    Err(bad(uri, &what).with("bytes", bytes))
}

/// Pairs of 64 bits, the halves of a uid of 32 hexadecimal digits.
async fn npy(stores: &Stores, uri: &str) -> Result<Ids> {
    let location = stores.open(uri)?;
    let meta = location.head("").await?;
    let meta = meta.ok_or_else(|| find::nothing_found(uri, uri))?;
    let (size, etag) = (meta.size, file::etag(&location, &meta));
    let file = ShardFile::new(location, size, etag);
    let first = match size {
        0 => Bytes::new(),
        _ => file.fetch(0..size.min(PIECE_BYTES)).await?,
    };
    let (rows, data) = header(&first).map_err(|what| bad(uri, &what))?;
    let from = (first.len() - data.len()) as u64;
    if size - from != rows.saturating_mul(ID_BYTES) {
        let what = format!("is cut off: {rows} ids do not fit into {size} bytes");
        return Err(bad(uri, &what));
    }
    fits(stores, uri, rows)?;
    let mut ids: Vec<u128> = Vec::new();
    // The file is as long as it says.
    ids.reserve_exact(usize::try_from(rows).unwrap_or(usize::MAX));
    let starts = (from..size).step_by(PIECE_BYTES as usize);
    let pieces = starts.map(|at| file.fetch(at..(at + PIECE_BYTES).min(size)));
    let mut pieces = stream::iter(pieces).buffered(PIECES_AT_ONCE);
    while let Some(piece) = pieces.try_next().await? {
        ids.extend(piece.as_chunks::<16>().0.iter().map(uid));
    }
    drop(pieces);
    sorted(ids, true, uri).await
}

/// Returns the uid of a pair.
fn uid(pair: &[u8; 16]) -> u128 {
    let swapped = u128::from_le_bytes(*pair);
    // The first half has the upper bits.
    swapped.rotate_left(64)
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
    use crate::storage::StorageConfig;

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

    #[tokio::test]
    async fn a_long_list_is_read_in_pieces_and_one_beyond_the_setting_is_refused() {
        let uids = (PIECE_BYTES / ID_BYTES) * 2 + 5;
        let header = format!(
            "{{'descr': [('f0', '<u8'), ('f1', '<u8')], 'fortran_order': False, \
             'shape': ({uids},), }}"
        );
        let data = (0..uids).flat_map(|n| [7, uids - n]);
        let data: Vec<u8> = data.flat_map(u64::to_le_bytes).collect();
        let open = async |ids_bytes_max| {
            let config = StorageConfig {
                ids_bytes_max,
                ..StorageConfig::default()
            };
            let stores = Stores::new(config);
            let list = stores.open("memory:///a.npy").unwrap();
            list.put("", file(&header, &data).into()).await.unwrap();
            read(&stores, "memory:///a.npy", "uid").await
        };
        let ids = open(uids * ID_BYTES).await.unwrap();
        let expected: Vec<u128> = (1..=u128::from(uids)).map(|n| 7 << 64 | n).collect();
        assert!(ids.ids == expected);
        let error = open(uids * ID_BYTES - 1).await.unwrap_err();
        assert_eq!(
            error.value("bytes"),
            Some((uids * ID_BYTES).to_string().as_str())
        );
        assert!(
            error.to_string().contains("storage.ids_bytes_max"),
            "{error}"
        );
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
