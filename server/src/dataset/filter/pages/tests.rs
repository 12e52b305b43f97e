use super::{
    super::{bounds::outcomes, expression::Literal},
    *,
};
use crate::{
    dataset::{
        Manifest, SourceRequest,
        fixtures::{self, batch, put, stores},
        index,
    },
    error::Result,
};
use arrow::array::{BinaryArray, Float32Array, Int64Array, StringArray};
use bytes::Bytes;
use parquet::{
    arrow::ArrowWriter,
    file::{
        metadata::{PageIndexPolicy, ParquetMetaData, ParquetMetaDataReader},
        properties::WriterProperties,
    },
};
use proptest::prelude::*;

const ROWS: i64 = 200_000;
const PAGE_ROWS: i64 = 1_000;
/// The columns that are compared, by their numbers in the file.
const ID: usize = 2;
const SCORE: usize = 3;

fn column(values: &[Option<i128>], page_rows: usize) -> Pages {
    let page = |page: &[Option<i128>]| {
        let known = || page.iter().flatten().copied();
        Bounds {
            low: known().min().map(Literal::Int),
            high: known().max().map(Literal::Int),
            nulls: Some(page.iter().filter(|value| value.is_none()).count() as u64),
            rows: page.len() as u64,
        }
    };
    Pages {
        starts: (0..values.len() as u32).step_by(page_rows).collect(),
        bounds: values.chunks(page_rows).map(page).collect(),
    }
}

proptest! {
    /// Pages of two columns end at different rows. What they decide is so.
    #[test]
    fn no_row_is_decided_wrongly(
        values in prop::collection::vec(
            (prop::option::of(-3_i128..4), prop::option::of(-3_i128..4)), 1..24),
        (a_rows, b_rows, has_b) in (1_usize..9, 1_usize..9, any::<bool>()),
        text in prop::sample::select(vec![
            "a < 1", "a <= -1 and b > 0", "a = 1 or b = 1", "b is null", "a is not null",
            "not (a > 0 and b < 3)", "b not in (0, 1)", "a between 0 and 2",
        ]),
    ) {
        let expression = super::super::parse(text).unwrap();
        let (a, b): (Vec<_>, Vec<_>) = values.iter().copied().unzip();
        let b = has_b.then(|| column(&b, b_rows));
        let columns = [("a", Some(column(&a, a_rows))), ("b", b)];
        let decided = runs(values.len() as u32, &columns, |bounds| {
            match outcomes(&expression, &bounds) {
                found if found.never() => Look::None,
                found if found.always() => Look::All,
                _ => Look::Read,
            }
        });
        prop_assert!(decided.windows(2).all(|pair| pair[0].look != pair[1].look));
        let is_wanted = |(a, b): &(Option<i128>, Option<i128>)| {
            let value = [a.map(Literal::Int), b.map(Literal::Int)];
            let of = |name: &str| value[usize::from(name == "b")].as_ref();
            expression.outcome(&of) == Some(true)
        };
        let wanted: Vec<bool> = values.iter().map(is_wanted).collect();
        let mut looks = Vec::new();
        for run in &decided {
            looks.extend(std::iter::repeat_n(run.look, run.rows as usize));
        }
        prop_assert_eq!(looks.len(), wanted.len());
        let read = wanted.iter().zip(&looks).filter(|(_, look)| **look == Look::Read);
        let read: Vec<bool> = read.map(|(wanted, _)| *wanted).collect();
        prop_assert_eq!(spread(&decided, &read), wanted);
        let selected = selection(&decided).map_or(values.len(), |rows| rows.row_count());
        prop_assert_eq!(selected, read.len());
    }
}

#[test]
fn nulls_of_a_part_of_a_page_are_known_if_all_or_none_are() {
    let pages = column(&[None, Some(1), None, None, Some(2), Some(3)], 2);
    let nulls = [(0, 1), (2, 1), (2, 2), (4, 2)].map(|(first, rows)| pages.of(first, rows).nulls);
    assert_eq!(nulls, [None, Some(1), Some(2), Some(0)]);
    assert_eq!(pages.of(5, 1).high, Some(Literal::Int(3)));
}

/// One row group: ids, and scores of 0 to 99 by turns, in pages of `page_rows`.
fn file(page_rows: i64, id: impl Fn(i64) -> i64) -> (Vec<u8>, ParquetMetaData) {
    let rows = 0..ROWS;
    let columns: Vec<(&str, ArrayRef)> = vec![
        (
            "jpg",
            Arc::new(BinaryArray::from_iter_values(rows.clone().map(|_| "i"))),
        ),
        (
            "caption",
            Arc::new(StringArray::from_iter_values(rows.clone().map(|_| "c"))),
        ),
        (
            "id",
            Arc::new(Int64Array::from_iter_values(rows.clone().map(id))),
        ),
        (
            "score",
            Arc::new(Float32Array::from_iter_values(
                rows.map(|n| (n % 100) as f32),
            )),
        ),
    ];
    let batch = batch(columns);
    let properties = WriterProperties::builder()
        .set_max_row_group_row_count(Some(ROWS as usize))
        .set_dictionary_enabled(false)
        .set_write_batch_size(page_rows as usize)
        .set_data_page_row_count_limit(page_rows as usize)
        .build();
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    let bytes = writer.into_inner().unwrap();
    let footer = ParquetMetaDataReader::new()
        .with_page_index_policy(PageIndexPolicy::Required)
        .parse_and_finish(&Bytes::from(bytes.clone()))
        .unwrap();
    (bytes, footer)
}

/// Damages the pages of a column whose first row is so.
fn damage(
    bytes: &mut [u8],
    footer: &ParquetMetaData,
    column: usize,
    is_damaged: impl Fn(i64) -> bool,
) {
    let pages = footer
        .page_index()
        .unwrap()
        .page_locations(0, column)
        .unwrap();
    for page in pages.iter().filter(|page| is_damaged(page.first_row_index)) {
        let (start, length) = (page.offset as usize, page.compressed_page_size as usize);
        bytes[start..start + length].fill(0xff);
    }
}

async fn indexed(bytes: Vec<u8>, predicate: &str) -> Result<Manifest> {
    let stores = stores();
    put(&stores, &[("0.parquet", bytes.into())]).await;
    let request = SourceRequest {
        predicate: Some(predicate.to_owned()),
        ..fixtures::request("memory:///data")
    };
    index(&stores, None, &[request]).await
}

fn kept(manifest: &Manifest) -> Vec<u64> {
    let block = &manifest.sources[0].shards[0].blocks[0];
    (0..block.rows).map(|row| block.row_in_shard(row)).collect()
}

#[tokio::test]
async fn pages_that_statistics_decide_are_not_read() {
    let (whole, footer) = file(PAGE_ROWS, |row| row);
    let after = 100_500..ROWS as u64;
    let low = after.clone().filter(|n| n % 100 < 50).collect();
    let ends = (0..1_000).chain(199_000..ROWS as u64).collect();
    for (predicate, read, expected) in [
        // One page has rows of both kinds.
        (
            "id >= 100500",
            100_000..101_000,
            after.collect::<Vec<u64>>(),
        ),
        ("id < 1000 or id >= 199000", 0..0, ends),
        ("id >= 100500 and score < 50", 100_000..ROWS, low),
    ] {
        let mut bytes = whole.clone();
        for column in [ID, SCORE] {
            damage(&mut bytes, &footer, column, |row| !read.contains(&row));
        }
        let manifest = indexed(bytes, predicate).await.unwrap();
        assert_eq!(kept(&manifest), expected, "{predicate}");
        let outside = manifest.sources[0].shards[0].outside;
        assert_eq!(outside, ROWS as u64 - expected.len() as u64);
    }
    // A page that is needed is read.
    let mut bytes = whole;
    damage(&mut bytes, &footer, ID, |row| row == 100_000);
    let error = indexed(bytes, "id >= 100500").await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("block 0 of memory:///data/0.parquet"),
        "{error}"
    );
}

/// Every second page is decided, and has fewer rows than the reader would skip one by one.
#[tokio::test]
async fn small_pages_between_others_are_not_decoded() {
    let (mut bytes, footer) = file(10, |row| if row / 10 % 2 == 0 { row % 10 } else { 0 });
    damage(&mut bytes, &footer, ID, |row| row / 10 % 2 == 1);
    let manifest = indexed(bytes, "id > 4").await.unwrap();
    let expected = (0..ROWS as u64).filter(|row| row / 10 % 2 == 0 && row % 10 > 4);
    assert!(kept(&manifest).into_iter().eq(expected));
}

#[test]
fn pages_that_cannot_be_are_refused_before_they_are_used() {
    let chunk = Chunk {
        column: 100..200,
        values: 0..0,
        places: 0..0,
        kind: Type::INT64,
        rows: 30,
    };
    let page = |offset, compressed_page_size, first_row_index| PageLocation {
        offset,
        compressed_page_size,
        first_row_index,
    };
    assert!(chunk.holds(&[page(100, 50, 0), page(150, 50, 29)]));
    for bad in [
        &[][..],
        &[page(99, 50, 0)],
        &[page(100, 101, 0)],
        &[page(100, -1, 0)],
        &[page(i64::MAX, i32::MAX, 0)],
        &[page(100, 50, 1)],
        &[page(100, 50, 0), page(150, 50, 0)],
        &[page(100, 50, 0), page(150, 50, 30)],
    ] {
        assert!(!chunk.holds(bad), "{bad:?}");
    }
    // A list of 2,147,483,647 pages, in a few bytes; and one of two, and of sixteen.
    assert!(announces_too_much(&[
        0x19, 0xfc, 0xff, 0xff, 0xff, 0xff, 0x07, 0, 0, 0
    ]));
    assert!(!announces_too_much(&[0x19, 0x2c, 0x16, 0, 0]));
    assert!(!announces_too_much(
        &[&[0x19, 0xfc, 0x10][..], &[0; 64]].concat()
    ));
}

#[tokio::test]
async fn a_damaged_index_is_as_none() {
    let (whole, footer) = file(PAGE_ROWS, |row| row);
    let id = footer.row_group(0).column(ID);
    let expected: Vec<u64> = (100_500..ROWS as u64).collect();
    for range in [id.column_index_range(), id.offset_index_range()] {
        let range = range.unwrap();
        let begin = range.start as usize;
        for value in [0, 0x7f, 0xff, 0x19] {
            let mut bytes = whole.clone();
            bytes[begin..range.end as usize].fill(value);
            // A list that is longer than any memory.
            if value == 0x19 {
                bytes[begin + 1..begin + 7].copy_from_slice(&[0xfc, 0xff, 0xff, 0xff, 0xff, 7]);
            }
            let manifest = indexed(bytes, "id >= 100500").await.unwrap();
            assert_eq!(kept(&manifest), expected);
        }
    }
}
