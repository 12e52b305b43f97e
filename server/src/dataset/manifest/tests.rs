use super::*;

#[test]
fn a_shard_holds_no_more_room_than_its_blocks_take() {
    let text = r#"{"path": "a", "size": 9, "etag": null,
        "blocks": [{"rows": 3, "first_row": 0, "bytes": [0, 9]}]}"#;
    let shard: Shard = serde_json::from_str(text).unwrap();
    assert_eq!((shard.blocks.len(), shard.blocks.capacity()), (1, 1));
}
