//! The metrics as a page for people.
use super::ALL;

/// Returns the reference page `docs/metrics.md`.
pub fn reference() -> String {
    let mut page = String::from(
        "# Metrics\n\nServed at `/metrics` in the Prometheus text format. Generated from \
        `server/src/metrics.rs` by `make docs`.\n\n\
         `process` tells where: on the `coordinator` (`superbatch serve`), on a `worker` \
         (`superbatch worker`, and `superbatch serve` \
         where its worker is embedded), or on `both`. Counters without labels, and those whose \
         labels are known beforehand, begin at \
         0.\n\n\
         | metric | type | process | labels | meaning |\n|---|---|---|---|---|\n",
    );
    for metric in ALL {
        let labels: Vec<String> = metric
            .labels
            .iter()
            .map(|label| format!("`{label}`"))
            .collect();
        let help = metric.help.split_whitespace().collect::<Vec<_>>().join(" ");
        let (name, kind, process) = (metric.name, metric.kind, metric.process.name());
        page.push_str(&format!(
            "| `{name}` | {kind} | {process} | {} | {help} |\n",
            labels.join(", ")
        ));
    }
    page
}
