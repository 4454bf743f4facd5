//! Prints how a demo goes: what is happening, what has happened and when, what it measured.

use std::io::{IsTerminal, Write};
use std::time::Instant;
use steadfast_rig::failover::Tell;

/// Prints the steps.
pub struct Story {
    began: Instant,
    step: Instant,
    colour: bool,
}

impl Story {
    /// Begins now.
    pub fn new() -> Story {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Story {
            began: Instant::now(),
            step: Instant::now(),
            colour,
        }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_string()
        }
    }

    /// A new part begins.
    pub fn title(&self, text: &str) {
        println!("\n{}\n", self.paint("1", text));
    }

    /// What is happening now; on a terminal the next line replaces it.
    pub fn doing(&mut self, text: &str) {
        self.step = Instant::now();
        if self.colour {
            print!("\r\x1b[K{:>8}  {} {text} ...", "", self.paint("33", "·"));
            let _ = std::io::stdout().flush();
        }
    }

    /// That has happened.
    pub fn done(&self, text: &str) {
        let clear = if self.colour { "\r\x1b[K" } else { "" };
        let at = self.paint("2", &format!("{:6.1} s", self.began.elapsed().as_secs_f64()));
        println!("{clear}{at}  {} {text}", self.paint("32", "✓"));
    }

    /// Seconds since the last [`Story::doing`].
    pub fn took(&self) -> f64 {
        self.step.elapsed().as_secs_f64()
    }

    /// More about it.
    pub fn more(&self, text: &str) {
        println!("{:>8}    {}", "", self.paint("2", text));
    }

    /// The demo has failed.
    pub fn failed(&self, text: &str) {
        let clear = if self.colour { "\r\x1b[K" } else { "" };
        eprintln!("{clear}{:>8}  {} {text}", "", self.paint("31", "✗"));
    }
}

impl Tell for Story {
    fn title(&mut self, text: &str) {
        Story::title(self, text);
    }
    fn doing(&mut self, text: &str) {
        Story::doing(self, text);
    }
    fn done(&mut self, text: &str) {
        Story::done(self, text);
    }
    fn more(&mut self, text: &str) {
        Story::more(self, text);
    }
}
