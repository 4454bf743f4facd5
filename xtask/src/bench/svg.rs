//! Bar charts as SVG text, readable on light and dark pages, without any dependency.

use std::fmt::Write;

/// A bar: parts are stacked from left to right.
pub struct Bar {
    /// Text to its left.
    pub label: String,
    /// One number per part, in the order of the chart's part names.
    pub parts: Vec<f64>,
}

/// A chart of horizontal bars.
pub struct Chart<'a> {
    /// Heading.
    pub title: &'a str,
    /// Unit of all numbers.
    pub unit: &'a str,
    /// Names of the stacked parts.
    pub parts: &'a [&'a str],
    /// The bars from top to bottom.
    pub bars: Vec<Bar>,
}

const COLOURS: [&str; 6] = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377"];
const WIDTH: f64 = 760.0;
const LEFT: f64 = 220.0;
const RIGHT: f64 = 90.0;
const LINE: f64 = 26.0;

impl Chart<'_> {
    /// The picture as SVG text.
    pub fn svg(&self) -> String {
        let total = |b: &Bar| b.parts.iter().sum::<f64>();
        let max = self.bars.iter().map(total).fold(0.0, f64::max);
        let scale = if max > 0.0 {
            (WIDTH - LEFT - RIGHT) / max
        } else {
            0.0
        };
        let top = 64.0;
        let height = top + LINE * self.bars.len() as f64 + 16.0;
        let mut s = String::new();
        let _ = writeln!(
            s,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
             height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
             <text x=\"16\" y=\"24\" font-size=\"15\" font-weight=\"bold\">{} ({})</text>",
            escape(self.title),
            escape(self.unit)
        );
        let mut x = 16.0;
        for (name, colour) in self.parts.iter().zip(COLOURS.iter().cycle()) {
            let _ = writeln!(
                s,
                "<rect x=\"{x}\" y=\"38\" width=\"12\" height=\"12\" fill=\"{colour}\"/>\
                 <text x=\"{}\" y=\"49\">{}</text>",
                x + 18.0,
                escape(name)
            );
            x += 40.0 + 8.0 * name.len() as f64;
        }
        for (i, bar) in self.bars.iter().enumerate() {
            let y = top + LINE * i as f64;
            let _ = writeln!(
                s,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
                LEFT - 8.0,
                y + 15.0,
                escape(&bar.label)
            );
            let mut x = LEFT;
            for (part, colour) in bar.parts.iter().zip(COLOURS.iter().cycle()) {
                let w = (part * scale).max(0.0);
                let _ = writeln!(
                    s,
                    "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"18\" fill=\"{colour}\"/>"
                );
                x += w;
            }
            let _ = writeln!(
                s,
                "<text x=\"{:.1}\" y=\"{:.1}\">{:.0}</text>",
                x + 6.0,
                y + 14.0,
                total(bar)
            );
        }
        s.push_str("</svg>\n");
        s
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_to_scale_and_text_is_escaped() {
        let chart = Chart {
            title: "a < b & c",
            unit: "us",
            parts: &["stop", "copy"],
            bars: vec![
                Bar {
                    label: "one".into(),
                    parts: vec![50.0, 50.0],
                },
                Bar {
                    label: "two".into(),
                    parts: vec![200.0, 0.0],
                },
            ],
        };
        let svg = chart.svg();
        assert!(svg.contains("a &lt; b &amp; c") && svg.ends_with("</svg>\n"));
        // The longest bar fills the width between the margins; a quarter of it is a quarter as wide.
        assert!(
            svg.contains("width=\"450.0\"") && svg.contains("width=\"112.5\""),
            "{svg}"
        );
        let empty = Chart {
            title: "",
            unit: "",
            parts: &[],
            bars: Vec::new(),
        };
        assert!(empty.svg().contains("<svg"));
    }
}
