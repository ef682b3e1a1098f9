//! Cursors and snapshots: each has one spelling, and "at or after" is an order that keeps its word: who is after
//! another has every change that the other has.
//!
//! The input is words with blanks between them. A word with a colon is a snapshot, one with a dash before it the bytes
//! of a cursor in hexadecimal, so that the input need not be valid base64; any other is a cursor.
#![no_main]

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use libfuzzer_sys::fuzz_target;
use relay::model::log::cursor::{Cursor, Epoch, Snapshot};

/// Each is compared with each other.
const MOST: usize = 5;

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let cursors: Vec<Cursor> = text.split_ascii_whitespace().filter_map(read).take(MOST).collect();
    let mut edges: Vec<(u64, i64)> = Vec::new();
    for cursor in &cursors {
        let ends = [Some(cursor.seen()), cursor.within().map(|within| within.until())];
        let numbers = [0, cursor.within().map_or(1, |within| within.number())];
        for snapshot in ends.into_iter().flatten() {
            let young = snapshot.running().iter().rev().take(8);
            for xid in [snapshot.xmax(), snapshot.xmin()].iter().chain(young) {
                for xid in [xid.saturating_sub(1), *xid, xid.saturating_add(1)] {
                    edges.extend(numbers.iter().flat_map(|n| [(xid, *n), (xid, n.saturating_add(1))]));
                }
            }
        }
    }
    for one in &cursors {
        assert!(one.is_at_or_after(one));
        for other in &cursors {
            if one.epoch() != other.epoch() {
                assert!(!one.is_at_or_after(other));
            }
            if !one.is_at_or_after(other) {
                continue;
            }
            for (xid, number) in &edges {
                assert!(one.has(*xid, *number) || !other.has(*xid, *number), "{one} {other} {xid} {number}");
            }
            for third in cursors.iter().filter(|third| other.is_at_or_after(third)) {
                assert!(one.is_at_or_after(third), "{one} {other} {third}");
            }
        }
    }
});

fn read(word: &str) -> Option<Cursor> {
    if word.contains(':') {
        let snapshot = Snapshot::parse(word).ok()?;
        assert_eq!(Snapshot::parse(&snapshot.to_string()).as_ref(), Ok(&snapshot));
        let cursor = Cursor::after(Epoch(1), snapshot);
        assert_eq!(cursor.to_string().parse().as_ref(), Ok(&cursor));
        return Some(cursor);
    }
    let word = match word.strip_prefix('-').map(bytes) {
        Some(bytes) => URL_SAFE_NO_PAD.encode(bytes),
        None => word.to_owned(),
    };
    let cursor: Cursor = word.parse().ok()?;
    assert_eq!(cursor.to_string(), word);
    Some(cursor)
}

fn bytes(digits: &str) -> Vec<u8> {
    let digits: Vec<u8> = digits.chars().filter_map(|digit| Some(digit.to_digit(16)? as u8)).collect();
    digits.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect()
}
