//! The parsed images of a change, and how their columns compare with those of the relation.

use std::collections::HashMap;
use std::sync::Arc;

use crate::model::catalog::relation::{Catalog, Relation};
use crate::model::row::change::{Change, ImageState, Operation, RelationId};
use crate::model::row::image::Image;

/// The images of one change of a batch.
pub struct ChangeImages<'a> {
    /// The images before and after.
    pub images: [Option<Image<'a>>; 2],
    /// Their positions among the images of the relation in this batch.
    pub slots: [Option<usize>; 2],
    /// How the columns compare with the relation's.
    pub layout: ImageColumns,
}

/// How the columns of a change's images compare with those of its relation now.
pub enum ImageColumns {
    /// The same names.
    Same,
    /// Columns were left out because the row was too large.
    Oversize(Vec<String>),
    /// Columns were added since: their values are unknown.
    Partial(Vec<String>),
    /// The relation was altered otherwise: a policy or filter would read the wrong values.
    Other,
}

impl<'a> ChangeImages<'a> {
    /// Returns the image before (0) or after (1), and its position.
    pub fn image(&self, side: usize) -> Option<(&Image<'a>, usize)> {
        self.images[side].as_ref().zip(self.slots[side])
    }

    /// Returns whether a column that `reads` accepts is missing and would be taken for null.
    pub fn is_missing(&self, reads: impl Fn(&str) -> bool) -> bool {
        match &self.layout {
            ImageColumns::Same => false,
            ImageColumns::Oversize(columns) | ImageColumns::Partial(columns) => {
                columns.iter().any(|column| reads(column))
            }
            ImageColumns::Other => true,
        }
    }
}

/// A change as one of the relations that it is of.
pub struct ChangeOf<'a> {
    /// The change's position in the batch.
    pub index: usize,
    /// The relation: the watched one, or a partition.
    pub relation: RelationId,
    /// The images; `None` when there are none.
    pub images: Option<ChangeImages<'a>>,
}

/// Parses the changes of a batch, each with the columns of each relation that it is of. Also returns the image texts of each
/// relation.
pub fn change_images<'a>(
    catalog: &'a Catalog,
    changes: &'a [Change],
) -> (Vec<ChangeOf<'a>>, HashMap<RelationId, Vec<&'a str>>) {
    let mut images: HashMap<RelationId, Vec<&str>> = HashMap::new();
    let mut changes_of = Vec::with_capacity(changes.len());
    for (index, change) in changes.iter().enumerate() {
        for relation in catalog.affected(change) {
            let images = images_of(relation, change, images.entry(relation.id()).or_default());
            changes_of.push(ChangeOf { index, relation: relation.id(), images });
        }
    }
    (changes_of, images)
}

fn images_of<'a>(
    relation: &'a Arc<Relation>,
    change: &'a Change,
    all: &mut Vec<&'a str>,
) -> Option<ChangeImages<'a>> {
    let texts = [change.before.as_deref(), change.after.as_deref()];
    if texts == [None, None] || change.operation == Operation::Gap {
        return None;
    }
    let mut layout = ImageColumns::Same;
    let images = texts.map(|text| {
        let image = Image::parse(text?, &relation.columns);
        match &image {
            Ok(image) => layout.compare(image, relation, change),
            Err(_) => layout = ImageColumns::Other,
        }
        image.ok()
    });
    let mut slot = |text: Option<&'a str>| {
        all.push(text.filter(|_| !matches!(layout, ImageColumns::Other))?);
        Some(all.len() - 1)
    };
    let slots = [slot(texts[0]), slot(texts[1])];
    Some(ChangeImages { images, slots, layout })
}

impl ImageColumns {
    fn compare(&mut self, image: &Image<'_>, relation: &Relation, change: &Change) {
        let row = image.row();
        let known = row.names().filter(|name| relation.column(name).is_some()).count();
        let is_incomplete = known < relation.columns.len();
        let may_be_incomplete = change.oversize || change.image_state == ImageState::Partial;
        let is_other = change.image_state == ImageState::Unreadable
            || known < row.names().len()
            || (is_incomplete && !may_be_incomplete)
            // Without its key, the row could not be identified: a partition may have one that the watched relation has not.
            || change.image_state == ImageState::Partial
                && relation.key.iter().any(|key| row.value(key).is_none());
        if is_other || matches!(self, Self::Other) {
            *self = Self::Other;
        } else if is_incomplete {
            let missing =
                relation.columns.iter().map(|column| &column.name).filter(|name| row.value(name).is_none());
            match self {
                Self::Oversize(columns) | Self::Partial(columns) => columns.extend(missing.cloned()),
                layout if change.image_state == ImageState::Partial => {
                    *layout = Self::Partial(missing.cloned().collect());
                }
                layout => *layout = Self::Oversize(missing.cloned().collect()),
            }
        }
    }
}
