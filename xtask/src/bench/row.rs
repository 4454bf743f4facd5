//! One measured number: the row of every benchmark, the same in JSON and in the table.

use serde::Serialize;

/// What a value should be.
#[allow(dead_code, reason = "a vocabulary; not every run of the list uses each")]
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// The value may not be larger.
    AtMost(f64),
    /// The value may not be smaller.
    AtLeast(f64),
    /// The value over the peer's may not be larger.
    RatioAtMost(f64),
    /// The value over the peer's may not be smaller.
    RatioAtLeast(f64),
}

/// A row. `ratio`, `goal` and `met` are derived when it is made, so they cannot disagree with the value.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Name of the benchmark.
    pub bench: String,
    /// What was measured.
    pub metric: String,
    /// Under which conditions: `key=value` words.
    pub case: String,
    /// The number.
    pub value: f64,
    /// Its unit.
    pub unit: String,
    /// What was measured beside us in the same run.
    pub peer: Option<String>,
    /// The peer's number, in the same unit.
    pub peer_value: Option<f64>,
    /// Value over peer's value.
    pub ratio: Option<f64>,
    /// The goal as text, e.g. `<= 500`.
    pub goal: Option<String>,
    /// Whether the goal was met.
    pub met: Option<bool>,
}

impl Row {
    /// A number without a peer or a goal.
    pub fn new(bench: &str, metric: &str, case: &str, value: f64, unit: &str) -> Self {
        Self {
            bench: bench.into(),
            metric: metric.into(),
            case: case.into(),
            value: round(value),
            unit: unit.into(),
            peer: None,
            peer_value: None,
            ratio: None,
            goal: None,
            met: None,
        }
    }

    /// Adds what a peer reached in the same run.
    pub fn beside(mut self, peer: &str, value: f64) -> Self {
        self.peer = Some(peer.into());
        self.peer_value = Some(round(value));
        self.ratio = (value != 0.0).then(|| round(self.value / value));
        self
    }

    /// Adds a goal. A goal on a ratio without a peer is not met.
    pub fn goal(mut self, goal: Goal) -> Self {
        let (text, met) = match goal {
            Goal::AtMost(g) => (format!("<= {g}"), self.value <= g),
            Goal::AtLeast(g) => (format!(">= {g}"), self.value >= g),
            Goal::RatioAtMost(g) => (format!("ratio <= {g}"), self.ratio.is_some_and(|r| r <= g)),
            Goal::RatioAtLeast(g) => (format!("ratio >= {g}"), self.ratio.is_some_and(|r| r >= g)),
        };
        self.goal = Some(text);
        self.met = Some(met);
        self
    }
}

/// Three digits after the point are more than any measurement holds.
fn round(v: f64) -> f64 {
    (v * 1000.0).round() / 1000.0
}

/// The median; 0 of nothing.
pub fn median(values: &mut [f64]) -> f64 {
    percentile(values, 50)
}

/// The `p`th percentile by rank.
pub fn percentile(values: &mut [f64], p: usize) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let at = (values.len() * p / 100).min(values.len().saturating_sub(1));
    values.get(at).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_has_every_key_of_the_agreed_row() {
        let row = Row::new("b", "m", "c", 1.23456, "us");
        let json = serde_json::to_value(&row).unwrap();
        let mut keys: Vec<_> = json.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        let mut want = [
            "bench",
            "metric",
            "case",
            "value",
            "unit",
            "peer",
            "peer_value",
            "ratio",
            "goal",
            "met",
        ];
        want.sort_unstable();
        assert_eq!(keys, want);
        assert_eq!(json["value"], 1.235);
        assert!(json["met"].is_null());
    }

    #[test]
    fn goals_are_judged() {
        let row = |v| Row::new("b", "m", "c", v, "us");
        assert_eq!(row(500.0).goal(Goal::AtMost(500.0)).met, Some(true));
        assert_eq!(row(501.0).goal(Goal::AtMost(500.0)).met, Some(false));
        assert_eq!(row(9.0).goal(Goal::AtLeast(10.0)).met, Some(false));
        let beside = row(90.0).beside("QEMU", 100.0);
        assert_eq!(beside.ratio, Some(0.9));
        assert_eq!(beside.clone().goal(Goal::RatioAtMost(1.0)).met, Some(true));
        assert_eq!(beside.goal(Goal::RatioAtLeast(1.0)).met, Some(false));
        assert_eq!(row(1.0).goal(Goal::RatioAtMost(1.0)).met, Some(false), "no peer");
    }

    #[test]
    fn medians() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut []), 0.0);
        let mut v: Vec<f64> = (0..100).map(f64::from).collect();
        assert_eq!(percentile(&mut v, 90), 90.0);
        assert_eq!(percentile(&mut v, 100), 99.0);
    }
}
