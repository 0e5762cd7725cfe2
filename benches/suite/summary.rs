//! Samples of several rounds, and their summary.

use std::collections::BTreeMap;

/// All samples, by section (a kind of measurement), contender and figure.
#[derive(Debug, Default, Clone)]
pub struct Book(BTreeMap<(String, String, String), Vec<f64>>);

/// The samples of one figure in several rounds.
#[derive(Debug, Clone, Copy)]
pub struct Summary {
    pub median: f64,
    pub least: f64,
    pub most: f64,
    pub rounds: usize,
}

impl Book {
    pub fn note(&mut self, section: &str, contender: &str, figure: &str, value: f64) {
        let key = (section.to_owned(), contender.to_owned(), figure.to_owned());
        self.0.entry(key).or_default().push(value);
    }

    pub fn get(&self, section: &str, contender: &str, figure: &str) -> Option<Summary> {
        Summary::of(self.samples(section, contender, figure)?)
    }

    pub fn samples(&self, section: &str, contender: &str, figure: &str) -> Option<&[f64]> {
        Some(self.0.get(&(section.to_owned(), contender.to_owned(), figure.to_owned()))?)
    }

    pub fn median(&self, section: &str, contender: &str, figure: &str) -> Option<f64> {
        self.get(section, contender, figure).map(|summary| summary.median)
    }

    /// The median of the ratios within each round. A disturbance of a whole round cancels out.
    pub fn ratio(&self, section: &str, figure: &str, contender: &str, reference: &str) -> Option<Summary> {
        let (ours, theirs) = (self.samples(section, contender, figure)?, self.samples(section, reference, figure)?);
        Summary::of(&ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect::<Vec<_>>())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// As text, for another benchmark's report.
    pub fn to_lines(&self) -> String {
        let line = |((section, contender, figure), samples): (&(String, String, String), &Vec<f64>)| {
            let samples: Vec<_> = samples.iter().map(f64::to_string).collect();
            format!("{section}\t{contender}\t{figure}\t{}\n", samples.join(" "))
        };
        self.0.iter().map(line).collect()
    }

    pub fn from_lines(text: &str) -> Option<Self> {
        let mut book = Self::default();
        for line in text.lines() {
            let mut fields = line.split('\t');
            let (section, contender, figure) = (fields.next()?, fields.next()?, fields.next()?);
            for sample in fields.next()?.split(' ') {
                book.note(section, contender, figure, sample.parse().ok()?);
            }
        }
        Some(book)
    }
}

impl Summary {
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (least, most) = (*sorted.first()?, *sorted.last()?);
        Some(Self { median: middle(&sorted), least, most, rounds: sorted.len() })
    }
}

fn middle(sorted: &[f64]) -> f64 {
    let half = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[half] } else { (sorted[half - 1] + sorted[half]) / 2.0 }
}

/// A percentile (0 to 100) of sorted numbers.
pub fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let last = sorted.len() - 1;
    sorted[((last as f64 * percent / 100.0).round() as usize).min(last)]
}

/// Cheap pseudorandom numbers, the same in each run (xorshift64*).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as usize * limit) >> 32
    }
}
