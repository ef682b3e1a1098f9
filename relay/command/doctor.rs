//! `relay doctor`: prints what is wrong with the database side, and what to do.

use std::io::Write;
use std::process::ExitCode;

use crate::postgres::connect::pool::Server;
use crate::postgres::doctor::{Finding, findings};

/// Prints a line per finding; the exit code is 1 if there is a fault.
///
/// `judge` is the server that evaluates policies, usually the same as `server`.
pub async fn run(server: &Server, judge: &Server) -> ExitCode {
    let findings = findings(server, judge).await;
    for finding in &findings {
        let (mark, text) = match finding {
            Finding::Good(text) => ("ok   ", text),
            Finding::Note(text) => ("note ", text),
            Finding::Fault(text) => ("FAULT", text),
        };
        let _ = writeln!(std::io::stdout(), "{mark} {text}");
    }
    let is_fault = |finding: &Finding| matches!(finding, Finding::Fault(_));
    if findings.iter().any(is_fault) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
