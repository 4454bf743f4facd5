//! Tables of rows, and the sections of `docs/benchmarks.md`: one per benchmark, replaced as a whole by each run.

use super::row::Row;
use std::fmt::Write;

/// Metrics (name, unit) and the cases of which exactly these were measured.
type Group<'a> = (Vec<(&'a str, &'a str)>, Vec<Row>);

/// Tables, one for all cases of which the same was measured, in the order in which these first appear.
pub fn tables(rows: &[Row]) -> String {
    let mut groups: Vec<Group<'_>> = Vec::new();
    let mut seen: Vec<&str> = Vec::new();
    for first in rows {
        if seen.contains(&first.case.as_str()) {
            continue;
        }
        seen.push(&first.case);
        let of_case: Vec<&Row> = rows.iter().filter(|r| r.case == first.case).collect();
        let metrics: Vec<_> = of_case
            .iter()
            .map(|r| (r.metric.as_str(), r.unit.as_str()))
            .collect();
        let of_case = of_case.into_iter().cloned();
        match groups.iter_mut().find(|(m, _)| *m == metrics) {
            Some((_, group)) => group.extend(of_case),
            None => groups.push((metrics, of_case.collect())),
        }
    }
    let all: Vec<String> = groups.iter().map(|(_, group)| table(group)).collect();
    all.join("\n")
}

/// A table: one line per case, one column per metric, in the order in which they first appear. Metrics that have a
/// goal or a peer are followed by what they are held against.
pub fn table(rows: &[Row]) -> String {
    let mut metrics: Vec<(&str, &str)> = Vec::new();
    let mut cases: Vec<&str> = Vec::new();
    for r in rows {
        if !metrics.contains(&(&r.metric, &r.unit)) {
            metrics.push((&r.metric, &r.unit));
        }
        if !cases.contains(&r.case.as_str()) {
            cases.push(&r.case);
        }
    }
    let mut out = String::from("| case |");
    for (metric, unit) in &metrics {
        let _ = write!(out, " {metric}, {unit} |");
    }
    out.push_str("\n|---|");
    out.push_str(&"---:|".repeat(metrics.len()));
    out.push('\n');
    for case in cases {
        let _ = write!(out, "| {case} |");
        for (metric, unit) in &metrics {
            let row = rows
                .iter()
                .find(|r| r.case == case && r.metric == *metric && r.unit == *unit);
            let _ = write!(out, " {} |", row.map_or_else(String::new, cell));
        }
        out.push('\n');
    }
    out
}

fn cell(r: &Row) -> String {
    let mut text = number(r.value);
    if let (Some(peer), Some(value)) = (&r.peer, r.peer_value) {
        let _ = write!(text, " ({peer}: {}", number(value));
        if let Some(ratio) = r.ratio {
            let _ = write!(text, ", ratio {ratio:.2}");
        }
        text.push(')');
    }
    if let (Some(goal), Some(met)) = (&r.goal, r.met) {
        let _ = write!(
            text,
            " (goal {goal}: {})",
            if met { "met" } else { "**not met**" }
        );
    }
    text
}

fn number(v: f64) -> String {
    if v.abs() >= 100.0 || v.fract() == 0.0 {
        format!("{v:.0}")
    } else if v.abs() >= 10.0 {
        format!("{v:.1}")
    } else {
        format!("{v:.2}")
    }
}

/// Puts `body` between the markers of `name`, which are added at the end if they are not there. Running it again
/// with the same body changes nothing.
pub fn replace_section(document: &str, name: &str, body: &str) -> String {
    let begin = format!("<!-- bench:{name} begin -->");
    let end = format!("<!-- bench:{name} end -->");
    let section = format!("{begin}\n{}\n{end}", body.trim_end());
    let found = document.find(&begin).and_then(|from| {
        document[from..]
            .find(&end)
            .map(|len| (from, from + len + end.len()))
    });
    match found {
        Some((from, to)) => format!("{}{section}{}", &document[..from], &document[to..]),
        None => format!("{}\n\n{section}\n", document.trim_end()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::row::Goal;
    use super::*;

    #[test]
    fn a_table_has_a_line_per_case_and_a_column_per_metric() {
        let rows = [
            Row::new("b", "pause", "n=1", 12.0, "us").goal(Goal::AtMost(500.0)),
            Row::new("b", "rate", "n=1", 1.5, "MB/s").beside("QEMU", 3.0),
            Row::new("b", "pause", "n=2", 1234.5, "us"),
        ];
        assert_eq!(
            table(&rows),
            "| case | pause, us | rate, MB/s |\n|---|---:|---:|\n\
             | n=1 | 12 (goal <= 500: met) | 1.50 (QEMU: 3, ratio 0.50) |\n\
             | n=2 | 1234 |  |\n"
        );
    }

    #[test]
    fn cases_with_other_metrics_have_a_table_of_their_own() {
        let rows = [
            Row::new("b", "pause", "n=1", 12.0, "us"),
            Row::new("b", "rate", "disk", 1.0, "MB/s"),
            Row::new("b", "pause", "n=2", 13.0, "us"),
        ];
        let text = tables(&rows);
        assert_eq!(text.matches("|---|---:|").count(), 2);
        assert!(
            text.contains("| n=1 | 12 |\n| n=2 | 13 |\n\n| case | rate, MB/s |"),
            "{text}"
        );
    }

    #[test]
    fn a_section_is_added_once_and_then_replaced() {
        let one = replace_section("# Benchmarks\n", "a", "first\n");
        assert_eq!(
            one,
            "# Benchmarks\n\n<!-- bench:a begin -->\nfirst\n<!-- bench:a end -->\n"
        );
        let two = replace_section(&one, "b", "other");
        let again = replace_section(&two, "a", "second");
        assert!(again.contains("second") && !again.contains("first") && again.contains("other"));
        assert_eq!(replace_section(&again, "a", "second"), again);
        assert_eq!(again.matches("bench:a begin").count(), 1);
    }
}
