//! Shapes: the columns of a relation when an image was written, and the mapping of such an image to the columns of today.
//!
//! Columns, types, attributes and labels have numbers, which survive a rename and are never reused. An image is read by the
//! numbers of its shape. An image that cannot be mapped is unreadable: a guess could show what is hidden.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Deserializer};

use crate::model::catalog::relation::{Catalog, Relation};
use crate::model::log::cursor::Snapshot;
use crate::model::row::change::{Change, ImageState, Operation, Row, quoted};
use crate::model::row::utc::to_utc;

/// A row of `relay.shapes`.
#[derive(Debug, Deserialize)]
pub struct ShapeRecord {
    /// The number, counted for each relation from 1.
    #[serde(rename = "shape")]
    number: i32,
    columns: Vec<NumberedColumn>,
    /// The transaction that made the shape.
    #[serde(deserialize_with = "number")]
    xid: u64,
    /// The snapshot in which that transaction made it.
    #[serde(deserialize_with = "snapshot")]
    seen: Snapshot,
    /// Whether the definition of a type changed, on which writers hold no lock.
    loose: bool,
    /// Whether the statement that altered the relation recorded the shape: then no image has the previous number and this shape.
    guarded: bool,
}

/// A column, or an attribute of a composite type.
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct NumberedColumn {
    num: i16,
    name: String,
    #[serde(rename = "type")]
    kind: u32,
    def: Option<Definition>,
}

/// What the text of a value depends on besides the type's number. The checks of a domain do not affect it.
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Definition {
    /// The function that converts the value to JSON.
    cast: Option<u32>,
    /// The base type of a domain.
    domain: Option<u32>,
    /// The element type of an array.
    array: Option<u32>,
    /// The definition of the base or element type.
    of: Option<Box<Definition>>,
    /// The labels of an enum, by their numbers.
    labels: Option<Labels>,
    /// The attributes of a composite type.
    row: Option<Vec<NumberedColumn>>,
}

/// How images of one shape are read.
#[derive(Debug)]
enum ShapeReader {
    /// The columns are the current ones; these hold timestamps, which have the time zone of the writer.
    Same(TimestampColumns),
    /// Each column is mapped or dropped; `is_partial` when current columns are missing.
    Older { columns: HashMap<String, Option<ColumnMapping>>, is_partial: bool },
    /// The images cannot be mapped.
    Unreadable,
}

/// The current column that an old one is mapped to.
#[derive(Debug)]
struct ColumnMapping {
    name: String,
    timestamps: Option<TimestampPath>,
    /// The current labels by the old ones, where one was renamed.
    labels: Option<HashMap<String, String>>,
}

/// Labels of enums by their numbers.
pub type Labels = BTreeMap<String, String>;

/// Columns with timestamps, by name.
type TimestampColumns = HashMap<String, TimestampPath>;

/// The location of timestamps in a value.
#[derive(Debug, Clone)]
enum TimestampPath {
    Value,
    Elements(Box<TimestampPath>),
}

/// The shapes of a relation and how images of each are read.
#[derive(Debug, Default)]
pub struct Shapes {
    readers: HashMap<i32, ShapeReader>,
    /// The labels of enum columns by their numbers.
    labels: HashMap<String, Labels>,
    /// Type changes on which writers hold no lock: an image of a writer that did not see one may mix old and new.
    loose: Vec<(u64, Snapshot)>,
}

impl Shapes {
    /// Creates the readers. `current` is the number of the current shape; `None` when that was not recorded.
    pub fn new(shapes: &[ShapeRecord], current: Option<i32>, key: &[String]) -> Self {
        let newest = current.and_then(|current| shapes.iter().find(|shape| shape.number == current));
        let reader = |shape: &ShapeRecord| {
            let is_mixed = shapes.iter().any(|next| next.number > shape.number && !next.guarded);
            match newest {
                Some(newest) if newest.number == shape.number => {
                    ShapeReader::Same(timestamps(&shape.columns))
                }
                Some(newest) if !is_mixed => ShapeReader::between(shape, newest, key),
                _ => ShapeReader::Unreadable,
            }
        };
        Self {
            readers: shapes.iter().map(|shape| (shape.number, reader(shape))).collect(),
            labels: newest.map(|newest| labels(&newest.columns)).unwrap_or_default(),
            loose: shapes
                .iter()
                .filter(|shape| shape.loose)
                .map(|shape| (shape.xid, shape.seen.clone()))
                .collect(),
        }
    }

    /// Returns the labels of the enums in a column, also inside arrays, domains and composite types.
    pub fn labels(&self, column: &str) -> Option<&Labels> {
        self.labels.get(column)
    }

    /// Whether a type may have changed while the change's transaction ran, without that transaction seeing it.
    fn is_mixed(&self, change: &Change) -> bool {
        let Some(began) = change.began else { return false };
        let may_overlap =
            |xid: u64, seen: &Snapshot| xid != change.xid && xid >= began && !seen.has_finished(change.xid);
        self.loose.iter().any(|(xid, seen)| may_overlap(*xid, seen))
    }

    /// Maps the change to the columns of today.
    fn read<'a>(&self, change: &'a Change) -> Cow<'a, Change> {
        if change.operation == Operation::Gap || change.before.is_none() && change.after.is_none() {
            return Cow::Borrowed(change);
        }
        let reader =
            change.shape.and_then(|shape| self.readers.get(&shape)).unwrap_or(&ShapeReader::Unreadable);
        let images = [change.before.as_deref(), change.after.as_deref()];
        let (images, image_state) = match reader {
            _ if self.is_mixed(change) => return unreadable(change),
            ShapeReader::Unreadable => return unreadable(change),
            ShapeReader::Same(timestamps) => {
                let images = images.map(|image| image.and_then(|image| timestamps_to_utc(image, timestamps)));
                if images == [None, None] {
                    return Cow::Borrowed(change);
                }
                (images, ImageState::Whole)
            }
            ShapeReader::Older { columns, is_partial } => {
                let mut mapped = [None, None];
                for (image, mapped) in images.iter().zip(&mut mapped) {
                    let Some(image) = image else { continue };
                    match rewritten(image, columns) {
                        Some(image) => *mapped = Some(image),
                        None => return unreadable(change),
                    }
                }
                (mapped, if *is_partial { ImageState::Partial } else { ImageState::Whole })
            }
        };
        let [before, after] = images;
        let mut change = change.clone();
        change.before = before.or(change.before);
        change.after = after.or(change.after);
        change.image_state = image_state;
        Cow::Owned(change)
    }
}

/// Maps the changes to the columns of this catalog.
pub fn read<'a>(catalog: &Catalog, changes: &'a [Change]) -> Cow<'a, [Change]> {
    let one = |change: &'a Change| match catalog.relation(change.relation) {
        Some(relation) => relation.shapes().read(change),
        None => Cow::Borrowed(change),
    };
    let read: Vec<Cow<'a, Change>> = changes.iter().map(one).collect();
    match read.iter().all(|change| matches!(change, Cow::Borrowed(_))) {
        true => Cow::Borrowed(changes),
        false => Cow::Owned(read.into_iter().map(Cow::into_owned).collect()),
    }
}

/// Whether the catalog knows the shape of the change.
pub fn knows(relation: &Relation, change: &Change) -> bool {
    change.shape.is_none_or(|shape| shape == 0 || relation.shapes().readers.contains_key(&shape))
}

fn unreadable(change: &Change) -> Cow<'_, Change> {
    let mut change = change.clone();
    change.image_state = ImageState::Unreadable;
    Cow::Owned(change)
}

/// Returns the labels of each enum column.
fn labels(columns: &[NumberedColumn]) -> HashMap<String, Labels> {
    let of = |column: &NumberedColumn| {
        let labels = column.def.as_ref().map(Definition::collect_labels).unwrap_or_default();
        (column.name.clone(), labels)
    };
    columns.iter().map(of).filter(|(_, labels)| !labels.is_empty()).collect()
}

impl Definition {
    /// Returns the labels of an enum, or of the enums in a nested type.
    fn collect_labels(&self) -> Labels {
        let own = self.labels.iter().flatten().map(|(number, label)| (number.clone(), label.clone()));
        let attributes = self.row.iter().flatten().filter_map(|attribute| attribute.def.as_ref());
        own.chain(self.of.as_deref().into_iter().chain(attributes).flat_map(Self::collect_labels)).collect()
    }
}

impl ShapeReader {
    fn between(then: &ShapeRecord, now: &ShapeRecord, key: &[String]) -> Self {
        let mut columns = HashMap::new();
        for old in &then.columns {
            let mapped = match now.columns.iter().find(|column| column.num == old.num) {
                None => None,
                Some(new) => {
                    let Some(labels) = old.mapping_to(new) else { return Self::Unreadable };
                    let timestamps = timestamp_path(old.kind, old.def.as_ref());
                    Some(ColumnMapping { name: new.name.clone(), timestamps, labels })
                }
            };
            columns.insert(old.name.clone(), mapped);
        }
        let is_new = |column: &&NumberedColumn| then.columns.iter().all(|old| old.num != column.num);
        let mut new = now.columns.iter().filter(is_new).peekable();
        let is_partial = new.peek().is_some();
        // Without its key, the row could not be identified.
        if new.any(|column| key.contains(&column.name)) {
            return Self::Unreadable;
        }
        Self::Older { columns, is_partial }
    }
}

impl NumberedColumn {
    /// Maps a value of one column to the other: `None` when the types differ; otherwise the current labels by the old ones, if
    /// one was renamed.
    fn mapping_to(&self, new: &Self) -> Option<Option<HashMap<String, String>>> {
        if self.kind != new.kind {
            return None;
        }
        match (&self.def, &new.def) {
            (old, new) if old == new => Some(None),
            (Some(old), Some(new)) => old.mapping_to(new),
            _ => None,
        }
    }
}

impl Definition {
    fn mapping_to(&self, new: &Self) -> Option<Option<HashMap<String, String>>> {
        if (self.cast, self.domain, self.array) != (new.cast, new.domain, new.array) || self.row != new.row {
            return None;
        }
        match (&self.labels, &new.labels, &self.of, &new.of) {
            (Some(old), Some(new), ..) if self.cast.is_none() => {
                let label =
                    |(number, label): (&String, &String)| Some((label.clone(), new.get(number)?.clone()));
                let labels: HashMap<String, String> = old.iter().map(label).collect::<Option<_>>()?;
                Some(labels.iter().any(|(then, now)| then != now).then_some(labels))
            }
            (None, None, Some(old), Some(new)) if old == new => Some(None),
            (None, None, Some(old), Some(new)) => old.mapping_to(new),
            _ => None,
        }
    }
}

/// The OIDs of `timestamptz` and its array type in `pg_type`.
const TIMESTAMPTZ: u32 = 1184;
const TIMESTAMPTZ_ARRAY: u32 = 1185;

fn timestamps(columns: &[NumberedColumn]) -> TimestampColumns {
    columns
        .iter()
        .filter_map(|column| Some((column.name.clone(), timestamp_path(column.kind, column.def.as_ref())?)))
        .collect()
}

/// Returns where a type holds timestamps. Those inside a composite value are already in UTC: the trigger writes them so.
fn timestamp_path(kind: u32, definition: Option<&Definition>) -> Option<TimestampPath> {
    match (kind, definition) {
        (TIMESTAMPTZ, _) => Some(TimestampPath::Value),
        (TIMESTAMPTZ_ARRAY, _) => Some(TimestampPath::Elements(Box::new(TimestampPath::Value))),
        (_, Some(Definition { domain: Some(base), of, .. })) => timestamp_path(*base, of.as_deref()),
        (_, Some(Definition { array: Some(element), of, .. })) => {
            Some(TimestampPath::Elements(Box::new(timestamp_path(*element, of.as_deref())?)))
        }
        _ => None,
    }
}

impl TimestampPath {
    /// Converts the timestamps of a value to UTC; `None` when they already are.
    fn to_utc(&self, json: &str) -> Option<String> {
        match self {
            Self::Value if json.ends_with("+00:00\"") => None,
            Self::Value => to_utc(json),
            Self::Elements(element) => each_element(json, &mut |value| match value.starts_with('[') {
                // An array of more dimensions.
                true => self.to_utc(value),
                false => element.to_utc(value),
            }),
        }
    }
}

/// Replaces elements of an array; `None` when all stay, or when it is no array.
fn each_element(json: &str, other: &mut dyn FnMut(&str) -> Option<String>) -> Option<String> {
    let elements: Vec<&serde_json::value::RawValue> = serde_json::from_str(json).ok()?;
    let others: Vec<Option<String>> = elements.iter().map(|element| other(element.get())).collect();
    others.iter().any(Option::is_some).then(|| {
        let texts =
            elements.iter().zip(&others).map(|(element, other)| other.as_deref().unwrap_or(element.get()));
        format!("[{}]", texts.collect::<Vec<_>>().join(","))
    })
}

/// Converts the timestamps of these fields to UTC; `None` when they already are.
fn timestamps_to_utc(json: &str, timestamps: &TimestampColumns) -> Option<String> {
    if timestamps.is_empty() {
        return None;
    }
    let row = Row::parse(json).ok()?;
    let converted = |name: &str, value: &str| timestamps.get(name)?.to_utc(value);
    let is_changed = row.fields().any(|(name, value)| converted(name, value).is_some());
    is_changed.then(|| {
        object(
            row.fields()
                .map(|(name, value)| (name, converted(name, value).map_or(Cow::Borrowed(value), Cow::Owned))),
        )
    })
}

fn object<'a>(fields: impl Iterator<Item = (&'a str, Cow<'a, str>)>) -> String {
    let fields: Vec<String> = fields.map(|(name, value)| format!("{}:{value}", quoted(name))).collect();
    format!("{{{}}}", fields.join(","))
}

/// Rewrites an image of an older shape with the current columns; `None` when it holds a column that the shape lacks.
fn rewritten(image: &str, columns: &HashMap<String, Option<ColumnMapping>>) -> Option<String> {
    let row = Row::parse(image).ok()?;
    let mut fields = Vec::with_capacity(row.names().len());
    for (name, value) in row.fields() {
        let Some(mapped) = columns.get(name)? else { continue };
        let moved = mapped.timestamps.as_ref().and_then(|timestamps| timestamps.to_utc(value));
        let mut value = moved.map_or(Cow::Borrowed(value), Cow::Owned);
        if let Some(labels) = &mapped.labels {
            value = Cow::Owned(renamed_labels(&value, labels)?);
        }
        fields.push((&*mapped.name, value));
    }
    Some(object(fields.into_iter()))
}

/// Replaces a label, or the labels of an array, by the current ones; `None` when one is unknown.
fn renamed_labels(json: &str, labels: &HashMap<String, String>) -> Option<String> {
    if json == "null" {
        return Some(json.to_owned());
    }
    if !json.starts_with('[') {
        let label: String = serde_json::from_str(json).ok()?;
        return labels.get(&label).map(|label| quoted(label));
    }
    let elements: Vec<&serde_json::value::RawValue> = serde_json::from_str(json).ok()?;
    let elements: Option<Vec<String>> =
        elements.iter().map(|element| renamed_labels(element.get(), labels)).collect();
    Some(format!("[{}]", elements?.join(",")))
}

fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

/// Ignores `xmin`: it may be the id of the transaction that took the snapshot, which the list omits.
fn snapshot<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Snapshot, D::Error> {
    let text = String::deserialize(deserializer)?;
    let bad = || serde::de::Error::custom("no snapshot");
    let mut parts = text.splitn(3, ':').skip(1);
    let (xmax, running) = parts.next().zip(parts.next()).ok_or_else(bad)?;
    let running: Result<Vec<u64>, _> =
        running.split(',').filter(|xid| !xid.is_empty()).map(str::parse::<u64>).collect();
    Snapshot::new(xmax.parse().map_err(|_| bad())?, running.map_err(|_| bad())?).map_err(|_| bad())
}
