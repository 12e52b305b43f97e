//! Makes a page of text from two looks at a service. Pure.
use crate::{admin::table::table, metrics::names};
use std::collections::{BTreeMap, HashMap};
use superbatch_proto::{
    reflect::Word,
    v1::{RunState, RunSummary},
};

/// Characters of the longest bar.
const BAR: f64 = 40.0;

/// The samples of a page in the Prometheus text format, by name and labels as written.
#[derive(Debug, Default)]
pub(super) struct Metrics(HashMap<String, f64>);

impl Metrics {
    pub(super) fn parse(page: &str) -> Self {
        let samples = page.lines().filter(|line| !line.starts_with('#'));
        let sample = |line: &str| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        };
        Self(samples.filter_map(sample).collect())
    }

    /// Returns the sum over all series of `name`.
    fn sum(&self, name: &str) -> f64 {
        let of = |key: &str| key.split('{').next() == Some(name);
        let found = self.0.iter().filter(|(key, _)| of(key));
        // The sum of no floats is -0, which would be printed with its sign.
        found.map(|(_, value)| value).sum::<f64>() + 0.0
    }

    /// Returns the values of `name` by the value of its only label.
    fn by_label(&self, name: &str, label: &str) -> BTreeMap<String, f64> {
        let start = format!("{name}{{{label}=\"");
        let value = |(key, value): (&String, &f64)| {
            let rest = key.strip_prefix(&start)?.strip_suffix("\"}")?;
            Some((rest.to_owned(), *value))
        };
        self.0.iter().filter_map(value).collect()
    }
}

/// Returns the page for `now`, with rates since `was`.
pub(super) fn view(
    was: (&[RunSummary], &Metrics),
    now: (&[RunSummary], &Metrics),
    seconds: f64,
) -> String {
    let grown = |name: &str| now.1.sum(name) - was.1.sum(name);
    let rate = |name: &str| grown(name) / seconds;
    let waits = grown(names::WAITS);
    let wait = grown(names::WAIT_SECONDS) / waits.max(1.0);
    let mut text = format!(
        "workers {:.0} (optimal {:.0})   steps/s {:.2}   candidates/s {:.0}   \
         wait a call {:.3} s   ready {:.0}\n\n",
        now.1.sum(names::WORKERS),
        now.1.sum(names::OPTIMAL_WORKERS),
        rate(names::STEPS),
        rate(names::CANDIDATES),
        wait,
        now.1.sum(names::READY),
    );
    text.push_str(&runs(was.0, now.0, seconds));
    text.push('\n');
    text.push_str(&stages(was.1, now.1, seconds));
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

/// Returns the seconds that each stage took in a second, as bars.
fn stages(was: &Metrics, now: &Metrics, seconds: f64) -> String {
    let name = names::STAGE_SECONDS;
    let (before, after) = (was.by_label(name, "stage"), now.by_label(name, "stage"));
    let spent = after.into_iter().map(|(stage, sum)| {
        let spent = (sum - before.get(&stage).copied().unwrap_or(0.0)) / seconds;
        (stage, spent.max(0.0))
    });
    let spent: Vec<(String, f64)> = spent.collect();
    let most = spent.iter().map(|(_, spent)| *spent).fold(1.0, f64::max);
    let line = |(stage, spent): &(String, f64)| {
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
        let (was, now) = (page(10, 4.0), page(16, 5.0));
        let text = view((&[summary(None)], &was), (&[summary(Some(3))], &now), 2.0);
        assert!(text.contains("workers 3 "), "{text}");
        assert!(text.contains("steps/s 3.00"), "{text}");
        assert!(text.contains("first  open"), "{text}");
        assert!(text.contains("2.00"), "four steps in two seconds: {text}");
        let bar = format!("fetch               0.50 s/s  {}\n", "#".repeat(20));
        assert!(text.ends_with(&bar), "{text}");
    }
}
