//! For tests: tars as people's tools write them.
use bytes::Bytes;
use tar::{Builder, EntryType, Header};

/// A member: its name and content.
pub(crate) type Member<'a> = (&'a str, &'a [u8]);

/// Returns a tar in GNU format, as Python's tarfile and img2dataset may write it.
pub(crate) fn tar(members: &[Member<'_>]) -> Bytes {
    let mut builder = Builder::new(Vec::new());
    for (name, content) in members {
        append(&mut builder, &mut Header::new_gnu(), name, content);
    }
    builder.into_inner().expect("memory takes a tar").into()
}

pub(super) fn append(
    builder: &mut Builder<Vec<u8>>,
    header: &mut Header,
    name: &str,
    content: &[u8],
) {
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_entry_type(EntryType::Regular);
    // Long names become a GNU header of their own.
    builder
        .append_data(header, name, content)
        .expect("memory takes a member");
}

/// Samples `rows` as img2dataset writes them: image, JSON, text.
pub(crate) fn img2dataset(rows: std::ops::Range<u32>) -> Bytes {
    let texts: Vec<_> = rows
        .map(|row| {
            let json = format!(r#"{{"caption": "caption {row}", "key": "{row:09}", "n": {row}}}"#);
            let content = [format!("image {row}"), json, format!("caption {row}")];
            (
                ["jpg", "json", "txt"].map(|field| format!("{row:09}.{field}")),
                content,
            )
        })
        .collect();
    let members = texts.iter().flat_map(|(names, contents)| {
        names
            .iter()
            .map(String::as_str)
            .zip(contents.iter().map(String::as_bytes))
    });
    tar(&members.collect::<Vec<_>>())
}
