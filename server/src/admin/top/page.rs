//! Makes a page of text from two looks at a service. Pure.
use super::metrics::Metrics;
use crate::{admin::table::table, metrics::names};
use std::collections::{BTreeMap, HashMap};
use superbatch_proto::{
    reflect::Word,
    v1::{RunState, RunSummary},
};

/// Characters of the longest bar.
const BAR: f64 = 40.0;

/// What was seen at one time: the runs, and the pages of metrics, the coordinator's first.
#[derive(Clone, Copy)]
pub(super) struct Seen<'a> {
    pub runs: &'a [RunSummary],
    pub pages: &'a [Metrics],
}

impl Seen<'_> {
    /// Returns the sum over all series of `name`.
    fn sum(self, name: &str) -> f64 {
        self.pages.iter().map(|page| page.sum(name)).sum::<f64>() + 0.0
    }
}

/// Returns the pages that were read both times. A process that was not seen before has no growth:
/// its counters would look as if they had begun at 0 just now.
fn pairs<'a>(was: Seen<'a>, now: Seen<'a>) -> impl Iterator<Item = (&'a Metrics, &'a Metrics)> {
    let pages = was.pages.iter().zip(now.pages);
    pages.filter(|(was, now)| !was.is_empty() && !now.is_empty())
}

/// Returns the page for `now`, with rates since `was`.
pub(super) fn view(was: Seen<'_>, now: Seen<'_>, seconds: f64) -> String {
    // A process that was started anew counts from 0.
    let grown = |name: &str| {
        let pages = pairs(was, now);
        let grown = pages.map(|(was, now)| (now.sum(name) - was.sum(name)).max(0.0));
        grown.sum::<f64>() + 0.0
    };
    let rate = |name: &str| grown(name) / seconds;
    let waits = grown(names::WAITS);
    let wait = grown(names::WAIT_SECONDS) / waits.max(1.0);
    let mut text = format!(
        "workers {:.0} (optimal {:.0})   steps/s {:.2}   candidates/s {:.0}   \
         wait a call {:.3} s   ready {:.0}\n\n",
        now.sum(names::WORKERS),
        now.sum(names::OPTIMAL_WORKERS),
        rate(names::STEPS),
        rate(names::CANDIDATES),
        wait,
        now.sum(names::READY),
    );
    text.push_str(&runs(was.runs, now.runs, seconds));
    text.push('\n');
    text.push_str(&stages(was, now, seconds));
    text
}

fn runs(was: &[RunSummary], now: &[RunSummary], seconds: f64) -> String {
    if now.is_empty() {
        return "no runs\n".into();
    }
    let head = ["run", "state", "generation", "step", "steps/s"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let known: HashMap<&str, Option<u64>> = was
        .iter()
        .map(|run| (run.run_id.as_str(), run.last_committed_step))
        .collect();
    for run in now {
        let before = known.get(run.run_id.as_str()).copied().flatten();
        // Steps are counted from 0, so a run whose last step is n has n + 1 steps.
        let steps = |step: Option<u64>| step.map_or(0.0, |step| step as f64 + 1.0);
        let rate = (steps(run.last_committed_step) - steps(before)).max(0.0) / seconds;
        let state = RunState::try_from(run.state).map(RunState::word);
        let step = run.last_committed_step;
        rows.push(vec![
            run.run_id.clone(),
            state.unwrap_or_default(),
            run.generation.to_string(),
            step.map_or_else(|| "-".into(), |step| step.to_string()),
            format!("{rate:.2}"),
        ]);
    }
    table(&rows)
}

/// Returns the seconds that each stage took in a second, over all processes, as bars.
fn stages(was: Seen<'_>, now: Seen<'_>, seconds: f64) -> String {
    let mut spent: BTreeMap<String, f64> = BTreeMap::new();
    for (was, now) in pairs(was, now) {
        let [before, after] = [was, now].map(|page| page.by_label(names::STAGE_SECONDS, "stage"));
        for (stage, sum) in after {
            let grown = sum - before.get(&stage).copied().unwrap_or(0.0);
            *spent.entry(stage).or_default() += grown.max(0.0) / seconds;
        }
    }
    let most = spent.values().copied().fold(1.0, f64::max);
    let line = |(stage, spent): (&String, &f64)| {
        let bar = "#".repeat((spent / most * BAR).round() as usize);
        let text = format!("{stage:<16} {spent:7.2} s/s  {bar}");
        format!("{}\n", text.trim_end())
    };
    spent.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(step: Option<u64>) -> RunSummary {
        RunSummary {
            run_id: "first".into(),
            state: RunState::Open.into(),
            last_committed_step: step,
            ..RunSummary::default()
        }
    }

    #[test]
    fn rates_are_those_of_the_time_between() {
        let page = |steps: u32, fetch: f64| {
            Metrics::parse(&format!(
                "# TYPE x counter\nsuperbatch_steps_committed_total{{mode=\"normal\"}} {steps}\n\
                 superbatch_steps_committed_total{{mode=\"uniform\"}} 1\nsuperbatch_workers 3\n\
                 superbatch_stage_duration_seconds_sum{{stage=\"fetch\"}} {fetch}\n"
            ))
        };
        let worker = |fetch: f64| {
            Metrics::parse(&format!(
                "superbatch_stage_duration_seconds_sum{{stage=\"fetch\"}} {fetch}\n"
            ))
        };
        // The third process was not seen before, and the fourth was started anew.
        let was = [page(10, 4.0), worker(7.0), Metrics::default(), worker(90.0)];
        let now = [page(16, 5.0), worker(8.0), worker(90.0), worker(1.0)];
        let [no_steps, steps] = [None, Some(3)].map(|step| [summary(step)]);
        let [was, now] =
            [(&no_steps, &was), (&steps, &now)].map(|(runs, pages)| Seen { runs, pages });
        let text = view(was, now, 2.0);
        assert!(text.contains("workers 3 "), "{text}");
        assert!(text.contains("steps/s 3.00"), "{text}");
        assert!(text.contains("first  open"), "{text}");
        assert!(text.contains("2.00"), "four steps in two seconds: {text}");
        let bar = format!("fetch               1.00 s/s  {}\n", "#".repeat(40));
        assert!(text.ends_with(&bar), "{text}");
    }
}
