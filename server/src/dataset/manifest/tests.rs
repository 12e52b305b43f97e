use super::*;

#[test]
fn a_shard_holds_no_more_room_than_its_blocks_take() {
    let text = r#"{"path": "a", "size": 9, "etag": null,
        "blocks": [{"rows": 3, "first_row": 0, "bytes": [0, 9]}]}"#;
    let shard: Shard = serde_json::from_str(text).unwrap();
    assert_eq!((shard.blocks.len(), shard.blocks.capacity()), (1, 1));
}

#[test]
fn what_is_computed_of_rows_stays_if_a_flaw_is_told_of_their_tar() {
    let source = |flaw: &str| {
        let text = format!(
            r#"{{"uri": "u", "root_uri": "u", "weight": 1.0, "columns": [],
                "layout": {{"image_column": "jpg", "image_in_struct": false,
                    "caption_column": "txt", "format": "Tar"}},
                "shards": [{{"path": "a", "size": 9, "etag": null,
                    "blocks": [{{"rows": 3, "first_row": 0, "bytes": [0, 9]}}]{flaw}}}]}}"#
        );
        serde_json::from_str::<SourceManifest>(&text).unwrap()
    };
    let (whole, flawed) = (source(""), source(r#", "flaw": "it has no end mark""#));
    assert_eq!(whole.shards[0].flaw, None);
    assert!(flawed.shards[0].flaw.is_some());
    assert_eq!(whole.rows_digest(), flawed.rows_digest());
    // As builds wrote it that told no flaw of such tars.
    let rows = concat!(
        r#"{"root_uri":"u","layout":{"image_column":"jpg","image_in_struct":false,"#,
        r#""caption_column":"txt","format":"Tar"},"shards":[{"path":"a","size":9,"etag":null,"#,
        r#""blocks":[{"rows":3,"first_row":0,"bytes":[0,9]}]}],"kept_by":null}"#
    );
    let before = blake3::hash(rows.as_bytes()).to_hex().to_string();
    assert_eq!(whole.rows_digest(), before);
}
