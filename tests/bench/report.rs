//! The table: one figure a line, with its target and how it was taken.

use crate::machine;
use crate::support::database::{cluster_url, connect};

/// Figures are printed as they come, so that a long run shows where it is.
pub struct Report {
    /// A short run.
    pub quick: bool,
    missed: usize,
    failed: usize,
    /// The figures to come are those of an older relay.
    older: bool,
    /// By name: the figure of the older relay, and of this one.
    compared: Vec<(String, Option<f64>, Option<f64>)>,
}

/// What a figure should be.
pub enum Target {
    AtMost(f64),
    AtLeast(f64),
    /// Told for comparison.
    None,
}

impl Report {
    /// Prints what the figures depend on.
    pub async fn begin(quick: bool) -> Self {
        let client = connect(&cluster_url()).await;
        let setting = async |name: &str| -> String {
            client.query_one("select current_setting($1)", &[&name]).await.unwrap().get(0)
        };
        println!(
            "{} cores ({}), PostgreSQL {}, fsync {}, synchronous_commit {}, load {}{}",
            machine::cores(),
            machine::processor(),
            setting("server_version").await,
            setting("fsync").await,
            setting("synchronous_commit").await,
            machine::load(),
            if quick { ", short run" } else { "" },
        );
        println!();
        println!("{:<52} {:>11}  {:<9} {:<4} how", "figure", "measured", "target", "met");
        Self { quick, missed: 0, failed: 0, older: false, compared: Vec::new() }
    }

    /// The figures to come are those of an older relay, measured for comparison; its misses do not count.
    pub fn measure_older(&mut self, older: bool) {
        self.older = older;
        println!("-- {}", if older { "the older relay" } else { "this relay" });
    }

    fn compare(&mut self, name: &str, measured: f64) {
        if self.older {
            self.compared.push((name.to_owned(), Some(measured), None));
        } else if let Some(known) =
            self.compared.iter_mut().find(|(known, _, new)| known == name && new.is_none())
        {
            known.2 = Some(measured);
        }
    }

    /// One figure.
    pub fn figure(&mut self, name: &str, measured: f64, unit: &str, target: &Target, how: &str) {
        let (wanted, met) = match target {
            Target::AtMost(most) => (format!("≤ {}", number(*most)), Some(measured <= *most)),
            Target::AtLeast(least) => (format!("≥ {}", number(*least)), Some(measured >= *least)),
            Target::None => (String::new(), None),
        };
        self.compare(name, measured);
        self.missed += usize::from(met == Some(false) && !self.older);
        let word = match met {
            Some(true) => "yes",
            Some(false) => "no",
            None => "",
        };
        let told = format!("{}{}{unit}", number(measured), if unit.is_empty() { "" } else { " " });
        println!("{name:<52} {told:>11}  {wanted:<9} {word:<4} {how}");
    }

    /// What has to be nothing: lost, repeated, out of order, refused.
    pub fn faults(&mut self, name: &str, faults: &[(&str, u64)]) {
        let told: Vec<String> = faults.iter().map(|(what, count)| format!("{what} {count}")).collect();
        let fine = faults.iter().all(|(_, count)| *count == 0);
        self.failed += usize::from(!fine && !self.older);
        println!("{name:<52} {}{}", told.join(", "), if fine { "" } else { "   WRONG" });
    }

    /// The load of the machine before the figures that follow.
    pub fn section(&self, name: &str) {
        println!("-- {name} (load {})", machine::load());
    }

    /// The sum. Faults fail the run; a missed target doesn't, as a busy machine misses some.
    pub fn end(self) {
        println!();
        if !self.compared.is_empty() {
            println!("{:<52} {:>11} {:>11} {:>9}", "compared", "older", "this", "ratio");
        }
        for (name, older, this) in &self.compared {
            if let (Some(older), Some(this)) = (older, this) {
                let ratio = if *older == 0.0 { String::new() } else { format!("×{:.2}", this / older) };
                println!("{name:<52} {:>11} {:>11} {ratio:>9}", number(*older), number(*this));
            }
        }
        println!("{} targets missed, {} counts wrong, load {}", self.missed, self.failed, machine::load());
        if self.failed > 0 {
            std::process::exit(1);
        }
    }
}

/// Three digits that mean something.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 10_000.0 => {
            let digits = format!("{value:.0}");
            let (head, tail) = digits.split_at(digits.len() - 3);
            match head.len() {
                0..4 => format!("{head} {tail}"),
                long => format!("{} {} {tail}", &head[..long - 3], &head[long - 3..]),
            }
        }
        size if size >= 100.0 || value.fract() == 0.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

/// The value below which this part of the values is.
pub fn percentile(values: &mut [f64], part: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    values.get((last as f64 * part).round() as usize).copied().unwrap_or(f64::NAN)
}
