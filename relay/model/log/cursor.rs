//! Positions in the changelog: which transactions a reader has seen, and the cursor text that a client gets for it.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// The version of a cursor's byte layout, its first byte.
const LAYOUT: u8 = 1;
/// A cursor travels in URLs and headers, whose usual limit is 8 KiB and whose highest is 64 KiB.
const MAX_TEXT: usize = 64 * 1024;
/// Far above the number of connections of any server, each of which has at most one transaction.
const MAX_RUNNING: usize = 100_000;

/// What one read of the database could see: every transaction below `xmax` that was not running.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Snapshot {
    xmax: u64,
    running: Vec<u64>,
}

/// One history of a database. Positions of different epochs cannot be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Epoch(pub i64);

/// A position in the feed. Its text form is one URL-safe string.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cursor {
    pub(super) epoch: Epoch,
    pub(super) seen: Snapshot,
    pub(super) within: Option<WithinPage>,
}

/// A position inside a page.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WithinPage {
    pub(super) until: Snapshot,
    pub(super) number: i64,
}

/// The reason why a text is not a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CursorError {
    /// Longer than any cursor of the relay.
    #[error("the cursor is too long")]
    TooLong,
    /// Not in the one form that the relay writes.
    #[error("the cursor is malformed")]
    Malformed,
    /// Written by another version of the relay.
    #[error("the cursor is of an unknown layout")]
    UnknownLayout,
    /// Not a snapshot in the form that PostgreSQL writes.
    #[error("the snapshot is malformed")]
    BadSnapshot,
    /// The end of the page precedes its start.
    #[error("the page ends before it starts")]
    EndsBeforeStart,
}

impl Snapshot {
    /// Creates a snapshot; `running` ascends, above 0 and below `xmax`.
    pub fn new(xmax: u64, running: Vec<u64>) -> Result<Self, CursorError> {
        let ascends = running.is_sorted_by(|a, b| a < b);
        let bounded =
            running.first().is_none_or(|first| *first > 0) && running.last().is_none_or(|last| *last < xmax);
        if xmax == 0 || !ascends || !bounded || running.len() > MAX_RUNNING {
            return Err(CursorError::BadSnapshot);
        }
        Ok(Self { xmax, running })
    }

    /// Parses PostgreSQL's `xmin:xmax:xip,xip`, and only what PostgreSQL itself would write.
    ///
    /// The server's own parser accepts blanks, signs and duplicates, and saturates at 2^64 - 1, which would mean "everything is
    /// seen". So text from clients never goes there unchecked.
    pub fn parse(text: &str) -> Result<Self, CursorError> {
        let bad = CursorError::BadSnapshot;
        let mut parts = text.splitn(3, ':');
        let (Some(xmin), Some(xmax), Some(list)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(bad);
        };
        let mut running = Vec::new();
        if !list.is_empty() {
            for xid in list.split(',') {
                if running.len() == MAX_RUNNING {
                    return Err(bad);
                }
                running.push(canonical_number(xid).ok_or(bad)?);
            }
        }
        let snapshot = Self::new(canonical_number(xmax).ok_or(bad)?, running)?;
        // `xmin` may be the id of the transaction that took the snapshot, which the list omits.
        if canonical_number(xmin).is_none_or(|xmin| xmin == 0 || xmin > snapshot.xmin()) {
            return Err(bad);
        }
        Ok(snapshot)
    }

    /// Returns the first transaction that had not begun.
    pub fn xmax(&self) -> u64 {
        self.xmax
    }

    /// Returns the oldest transaction that had not finished.
    pub fn xmin(&self) -> u64 {
        self.running.first().copied().unwrap_or(self.xmax)
    }

    /// Returns the transactions below `xmax` that had not finished, ascending.
    pub fn running(&self) -> &[u64] {
        &self.running
    }

    /// Whether the transaction had committed or rolled back.
    pub fn has_finished(&self, xid: u64) -> bool {
        xid < self.xmax && self.running.binary_search(&xid).is_err()
    }

    /// Whether every transaction that had finished here had finished in `later` too; true of a snapshot and itself.
    pub fn is_before_or_equal(&self, later: &Self) -> bool {
        let still_running = &later.running[..later.running.partition_point(|xid| *xid < self.xmax)];
        self.xmax <= later.xmax && still_running.iter().all(|xid| !self.has_finished(*xid))
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:", self.xmin(), self.xmax)?;
        for (n, xid) in self.running.iter().enumerate() {
            let comma = if n == 0 { "" } else { "," };
            write!(f, "{comma}{xid}")?;
        }
        Ok(())
    }
}

impl Cursor {
    /// Returns the position after everything that had finished in `seen`.
    pub fn after(epoch: Epoch, seen: Snapshot) -> Self {
        Self { epoch, seen, within: None }
    }

    /// Returns the position inside the page from `seen` to `until`, after the change with this number.
    pub fn inside(epoch: Epoch, seen: Snapshot, until: Snapshot, number: i64) -> Result<Self, CursorError> {
        if number < 0 {
            return Err(CursorError::Malformed);
        }
        if !seen.is_before_or_equal(&until) {
            return Err(CursorError::EndsBeforeStart);
        }
        Ok(Self { epoch, seen, within: Some(WithinPage { until, number }) })
    }

    /// Returns the history that the cursor belongs to.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Returns the snapshot that the reader has seen completely.
    pub fn seen(&self) -> &Snapshot {
        &self.seen
    }

    /// Returns the position inside the next page, when the reader stopped there.
    pub fn within(&self) -> Option<&WithinPage> {
        self.within.as_ref()
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, CursorError> {
        let mut bytes = Bytes(bytes);
        if bytes.byte()? != LAYOUT {
            return Err(CursorError::UnknownLayout);
        }
        let epoch = Epoch(bytes.big_endian()?);
        let xmax = bytes.varint()?;
        let seen = bytes.running(xmax)?;
        if bytes.0.is_empty() {
            return Ok(Self::after(epoch, seen));
        }
        let end = xmax.checked_add(bytes.varint()?).ok_or(CursorError::Malformed)?;
        let until = bytes.running(end)?;
        let number = i64::try_from(bytes.varint()?).map_err(|_| CursorError::Malformed)?;
        if !bytes.0.is_empty() {
            return Err(CursorError::Malformed);
        }
        Self::inside(epoch, seen, until, number)
    }
}

/// A page of the changelog: the transactions that finished after one snapshot and up to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// The history.
    pub epoch: Epoch,
    /// The snapshot at the start.
    pub seen: Snapshot,
    /// The snapshot at the end.
    pub until: Snapshot,
}

impl Span {
    /// Returns the position after the whole page.
    pub fn end(&self) -> Cursor {
        Cursor::after(self.epoch, self.until.clone())
    }
}

impl WithinPage {
    /// Returns the snapshot at the end of the page.
    pub fn until(&self) -> &Snapshot {
        &self.until
    }

    /// Returns the number of the last change that the reader has.
    pub fn number(&self) -> i64 {
        self.number
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = vec![LAYOUT];
        bytes.extend(self.epoch.0.to_be_bytes());
        push_varint(&mut bytes, self.seen.xmax);
        push_running(&mut bytes, &self.seen);
        if let Some(WithinPage { until, number }) = &self.within {
            push_varint(&mut bytes, until.xmax - self.seen.xmax);
            push_running(&mut bytes, until);
            push_varint(&mut bytes, number.unsigned_abs());
        }
        f.write_str(&URL_SAFE_NO_PAD.encode(bytes))
    }
}

impl FromStr for Cursor {
    type Err = CursorError;

    /// Accepts exactly what [`Display`](fmt::Display) writes, so that equal positions have equal text.
    fn from_str(text: &str) -> Result<Self, CursorError> {
        if text.len() > MAX_TEXT {
            return Err(CursorError::TooLong);
        }
        Self::from_bytes(&URL_SAFE_NO_PAD.decode(text).map_err(|_| CursorError::Malformed)?)
    }
}

/// Writes the running transactions from the newest down, each as the distance to the one before: open transactions are mostly
/// young, so a distance is mostly one byte.
fn push_running(bytes: &mut Vec<u8>, snapshot: &Snapshot) {
    push_varint(bytes, snapshot.running.len() as u64);
    let mut above = snapshot.xmax;
    for xid in snapshot.running.iter().rev() {
        push_varint(bytes, above - xid);
        above = *xid;
    }
}

fn push_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

/// Parses digits without sign, blank or leading zero.
fn canonical_number(text: &str) -> Option<u64> {
    let leading_zero = text.len() > 1 && text.starts_with('0');
    if leading_zero || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// The unread bytes of a cursor.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> Result<u8, CursorError> {
        let (first, rest) = self.0.split_first().ok_or(CursorError::Malformed)?;
        self.0 = rest;
        Ok(*first)
    }

    fn big_endian(&mut self) -> Result<i64, CursorError> {
        let (first, rest) = self.0.split_first_chunk().ok_or(CursorError::Malformed)?;
        self.0 = rest;
        Ok(i64::from_be_bytes(*first))
    }

    fn varint(&mut self) -> Result<u64, CursorError> {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            let overflows = shift > 63 || (shift == 63 && bits > 1);
            let padded = shift > 0 && byte == 0;
            if overflows || padded {
                return Err(CursorError::Malformed);
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        Ok(value)
    }

    fn running(&mut self, xmax: u64) -> Result<Snapshot, CursorError> {
        let count = self.varint()?;
        if count > MAX_RUNNING as u64 {
            return Err(CursorError::Malformed);
        }
        // No reservation: the claimed length is not trusted.
        let mut running = Vec::new();
        let mut above = xmax;
        for _ in 0..count {
            let distance = self.varint()?;
            above = above.checked_sub(distance).filter(|_| distance > 0).ok_or(CursorError::Malformed)?;
            running.push(above);
        }
        running.reverse();
        Snapshot::new(xmax, running).map_err(|_| CursorError::Malformed)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check_snapshot(text: &str, expected: Option<(u64, &[u64])>) {
        let found = Snapshot::parse(text);
        assert_eq!(found.as_ref().ok().map(|s| (s.xmax(), s.running())), expected, "{text}");
        if let Ok(found) = found {
            assert_eq!(found.to_string(), text);
        }
    }

    fn snapshot(text: &str) -> Snapshot {
        Snapshot::parse(text).unwrap()
    }

    #[test]
    fn snapshots_are_parsed_as_the_server_writes_them() {
        check_snapshot("742:742:", Some((742, &[])));
        check_snapshot("5:9:5", Some((9, &[5])));
        check_snapshot("5:9:5,6,8", Some((9, &[5, 6, 8])));
        // Taken by a transaction that does not list its own id.
        for (text, same) in [("5:9:", "9:9:"), ("4:9:5", "5:9:5")] {
            assert_eq!(Snapshot::parse(text), Snapshot::parse(same), "{text}");
        }
        check_snapshot("18446744073709551615:18446744073709551615:", Some((u64::MAX, &[])));
    }

    #[test]
    fn malformed_snapshots_are_refused() {
        for text in [
            "",
            ":",
            "::",
            "5",
            "5:9",
            "5:9:5:6",
            " 5:9:5",
            "5:9:5 ",
            "5:9: 5",
            "+5:9:5",
            "5:9:+5",
            "-5:9:5",
            "05:9:5",
            "5:09:5",
            "5:9:05",
            "5:9:5,",
            "5:9:,5",
            "5:9:5,5",
            "5:9:6,5",
            "5:9:5,9",
            "6:9:5",
            "2:1:",
            "1:5:9",
            "0:5:",
            "0:5:0",
            "0:0:",
            "5:9:5\n",
            "5:9:5\0",
            "5:9:x",
            "1:99999999999999999999999:",
            "1:18446744073709551616:",
            "\u{665}:\u{669}:\u{665}",
        ] {
            check_snapshot(text, None);
        }
    }

    #[test]
    fn transactions_below_xmax_have_finished_unless_running() {
        let seen = snapshot("5:9:5,7");
        assert_eq!((1..11).filter(|xid| seen.has_finished(*xid)).collect::<Vec<_>>(), [1, 2, 3, 4, 6, 8]);
        assert_eq!((seen.xmin(), snapshot("9:9:").xmin()), (5, 9));
    }

    #[test]
    fn a_later_snapshot_includes_an_earlier_one() {
        let check = |earlier, later, expected| {
            assert_eq!(snapshot(earlier).is_before_or_equal(&snapshot(later)), expected, "{earlier} {later}");
        };
        check("5:9:5,7", "5:9:5,7", true);
        check("5:9:5,7", "7:9:7", true);
        check("5:9:5,7", "5:20:5,7,9,15", true);
        check("7:9:7", "5:9:5,7", false);
        check("9:9:", "8:20:8", false);
        check("9:9:", "8:8:", false);
    }

    #[test]
    fn each_cursor_has_one_text() {
        let check = |cursor: Cursor, text: &str| {
            assert_eq!(cursor.to_string(), text);
            assert_eq!(text.parse(), Ok(cursor));
        };
        check(Cursor::after(Epoch(-2), snapshot("742:742:")), "Af_________-5gUA");
        check(Cursor::after(Epoch(1), snapshot("5:300:5,299")), "AQAAAAAAAAABrAICAaYC");
        let inside = Cursor::inside(Epoch(0), snapshot("5:9:5"), snapshot("9:12:9"), 1000).unwrap();
        check(inside, "AQAAAAAAAAAACQEEAwED6Ac");
    }

    fn check_bytes(bytes: &[u8], expected: CursorError) {
        assert_eq!(URL_SAFE_NO_PAD.encode(bytes).parse::<Cursor>(), Err(expected), "{bytes:?}");
    }

    #[test]
    fn malformed_cursors_are_refused() {
        let malformed = CursorError::Malformed;
        let after_epoch = |rest: &[u8]| [&[LAYOUT, 0, 0, 0, 0, 0, 0, 0, 0], rest].concat();
        check_bytes(&[], malformed);
        check_bytes(&[2, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0], CursorError::UnknownLayout);
        check_bytes(&[LAYOUT, 0, 0, 0], malformed);
        for rest in [
            &[][..],
            &[9],
            // `xmax` 0; a padded 9; more than 64 bits.
            &[0, 0],
            &[0x89, 0, 0],
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0],
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
            // Fewer running than claimed; distances of zero, or below the first transaction.
            &[9, 2, 1],
            &[9, 1, 0],
            &[9, 1, 9],
            &[9, 1, 10],
            // A claim of far too many running.
            &[9, 0xff, 0xff, 0xff, 0x7f],
            // The page's end is cut off, overflows, or is followed by another byte.
            &[9, 0, 0],
            &[9, 0, 0, 0],
            &[9, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0, 0],
            &[9, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1],
            &[9, 0, 0, 0, 0, 0],
        ] {
            check_bytes(&after_epoch(rest), malformed);
        }
        check_bytes(&after_epoch(&[9, 0, 3, 1, 4, 0]), CursorError::EndsBeforeStart);
        for text in ["AQAAAAAAAAAACQA=", "AQAAAAAAAAAACQB", "AQAAAAAAAAAA+Q", " ", "AQAAAAAAAAAACQA\n"] {
            assert_eq!(text.parse::<Cursor>(), Err(malformed), "{text}");
        }
        assert_eq!("A".repeat(MAX_TEXT + 1).parse::<Cursor>(), Err(CursorError::TooLong));
    }

    #[test]
    fn a_page_ends_after_its_start() {
        let inside =
            |seen, until, number| Cursor::inside(Epoch(0), snapshot(seen), snapshot(until), number).err();
        assert_eq!(inside("5:9:5", "5:9:5", 0), None);
        assert_eq!(inside("5:9:5", "6:9:6", 0), Some(CursorError::EndsBeforeStart));
        assert_eq!(inside("5:9:5", "8:8:", 0), Some(CursorError::EndsBeforeStart));
        assert_eq!(inside("5:9:5", "9:9:", -1), Some(CursorError::Malformed));
    }

    prop_compose! {
        fn any_snapshot()(
            mut xids in proptest::collection::btree_set(
                prop_oneof![1..2000_u64, 1..=u64::MAX], 1..40
            )
        ) -> Snapshot {
            let xmax = xids.pop_last().unwrap();
            Snapshot::new(xmax, xids.into_iter().collect()).unwrap()
        }
    }

    prop_compose! {
        /// Some running transactions finish, and new ones begin.
        fn any_page()(
            seen in any_snapshot(), finish in any::<u64>(), begin in 0..500_u64, open in any::<u64>()
        ) -> (Snapshot, Snapshot) {
            let xmax = seen.xmax.saturating_add(begin);
            let bit = |bits: u64, n: u64| bits >> (n % 64) & 1 == 1;
            let old = seen.running.iter().copied().filter(|xid| bit(finish, *xid));
            let new = (seen.xmax..xmax).filter(|xid| bit(open, *xid));
            let until = Snapshot::new(xmax, old.chain(new).collect()).unwrap();
            (seen, until)
        }
    }

    proptest! {
        #[test]
        fn snapshots_round_trip(snapshot in any_snapshot()) {
            prop_assert_eq!(Snapshot::parse(&snapshot.to_string()), Ok(snapshot));
        }

        #[test]
        fn cursors_round_trip(epoch in any::<i64>(), seen in any_snapshot()) {
            let cursor = Cursor::after(Epoch(epoch), seen);
            prop_assert_eq!(cursor.to_string().parse(), Ok(cursor));
        }

        #[test]
        fn cursors_inside_a_page_round_trip(epoch in any::<i64>(), page in any_page(), number in 0..=i64::MAX) {
            let (seen, until) = page;
            let cursor = Cursor::inside(Epoch(epoch), seen, until, number).unwrap();
            prop_assert_eq!(cursor.to_string().parse(), Ok(cursor));
        }

        #[test]
        fn an_accepted_text_is_the_only_one_of_its_cursor(rest in proptest::collection::vec(any::<u8>(), 0..40)) {
            let text = URL_SAFE_NO_PAD.encode([&[LAYOUT], rest.as_slice()].concat());
            if let Ok(cursor) = text.parse::<Cursor>() {
                prop_assert_eq!(cursor.to_string(), text);
            }
        }

        #[test]
        fn no_text_panics(text in "\\PC*", near in "[0-9]{0,3}:[0-9]{0,3}:[0-9,]{0,12}") {
            let _ = text.parse::<Cursor>();
            let _ = Snapshot::parse(&text);
            if let Ok(snapshot) = Snapshot::parse(&near) {
                prop_assert_eq!(Snapshot::parse(&snapshot.to_string()), Ok(snapshot));
            }
        }
    }
}
