//! The page's files, embedded from `web/` without a build step. The page loads nothing from other
//! hosts.
use axum::{
    body::Body,
    http::{HeaderMap, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;

struct Asset {
    path: &'static str,
    kind: &'static str,
    bytes: &'static [u8],
}

macro_rules! assets {
    ($($name:literal: $kind:literal),* $(,)?) => {
        [$(Asset {
            path: concat!("/", $name),
            kind: $kind,
            bytes: include_bytes!(concat!("web/", $name)),
        }),*]
    };
}

static ASSETS: &[Asset] = &assets! {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "api.js": "text/javascript; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "captions.js": "text/javascript; charset=utf-8",
    "chart.js": "text/javascript; charset=utf-8",
    "compare.js": "text/javascript; charset=utf-8",
    "dom.js": "text/javascript; charset=utf-8",
    "example.js": "text/javascript; charset=utf-8",
    "format.js": "text/javascript; charset=utf-8",
    "mix.js": "text/javascript; charset=utf-8",
    "pairs.js": "text/javascript; charset=utf-8",
    "redraw.js": "text/javascript; charset=utf-8",
    "run.js": "text/javascript; charset=utf-8",
    "runs.js": "text/javascript; charset=utf-8",
    "step.js": "text/javascript; charset=utf-8",
    "thumbs.js": "text/javascript; charset=utf-8",
};

/// Serves one of the files, or answers that it has not changed.
pub(super) async fn asset(uri: Uri, headers: HeaderMap) -> Response {
    let path = if uri.path() == "/" {
        "/index.html"
    } else {
        uri.path()
    };
    let Some(asset) = ASSETS.iter().find(|asset| asset.path == path) else {
        return (StatusCode::NOT_FOUND, "there is no such page").into_response();
    };
    // Another build serves other files under the same names, so a browser must ask each time.
    let tag = format!("\"{}\"", &blake3::hash(asset.bytes).to_hex()[..16]);
    let caching = [
        (header::ETAG, tag.clone()),
        (header::CACHE_CONTROL, "no-cache".to_owned()),
    ];
    if headers
        .get(header::IF_NONE_MATCH)
        .is_some_and(|known| known.as_bytes() == tag.as_bytes())
    {
        return (StatusCode::NOT_MODIFIED, caching).into_response();
    }
    (
        caching,
        [(header::CONTENT_TYPE, asset.kind)],
        Body::from(Bytes::from_static(asset.bytes)),
    )
        .into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::BTreeSet, fs, path::Path};

    /// All files together, before any compression.
    const BYTES_MAX: usize = 150 << 10;

    #[test]
    fn every_file_of_the_page_is_embedded_and_they_are_small() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/page/web");
        let files = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let embedded = ASSETS.iter().map(|asset| asset.path[1..].to_owned());
        assert_eq!(
            files.collect::<BTreeSet<_>>(),
            embedded.collect::<BTreeSet<_>>()
        );
        let bytes: usize = ASSETS.iter().map(|asset| asset.bytes.len()).sum();
        assert!(bytes <= BYTES_MAX, "{bytes} bytes");
    }

    #[test]
    fn nothing_comes_from_elsewhere_and_nothing_is_inline() {
        let index = include_str!("web/index.html");
        for forbidden in ["<script>", "<style", "style=", "onclick", "http:", "https:"] {
            assert!(!index.contains(forbidden), "{forbidden}");
        }
        for asset in ASSETS.iter().filter(|asset| asset.path.ends_with(".js")) {
            let text = std::str::from_utf8(asset.bytes).unwrap();
            for forbidden in [
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "eval(",
                "http:",
                "https:",
            ] {
                assert!(!text.contains(forbidden), "{}: {forbidden}", asset.path);
            }
        }
    }
}
