//! The feed's interface for sessions.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use time::{OffsetDateTime, PrimitiveDateTime};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use crate::feed::command::{Command, DeliveredUpTo};
use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::group::Subscriber;
use crate::feed::deliver::hub::ChannelDescription;
use crate::feed::deliver::members::Reader;
use crate::feed::deliver::outbox::Outbox;
use crate::feed::lanes::Lanes;
use crate::feed::replay::bookmarks::BookmarkHandle;
use crate::feed::replay::reader::ReplayReader;
use crate::feed::subscribe::{BIND_TIMEOUT, BindError, Binder, RequestError};
use crate::model::catalog::relation::{Catalog, Relation};
use crate::model::codec::payload::record;
use crate::model::identity::bookmark::{BookmarkKey, Opened};
use crate::model::log::cursor::Cursor;
use crate::model::policy::visibility::Identity;
use crate::model::session::channel::ChannelId;
use crate::model::session::join::Recall;
use crate::model::session::limits::RowLimit;
use crate::model::session::stored_broadcast::Recalled;
use crate::model::subscription::binding::{Binding, Scope, Subscription};
use crate::model::subscription::paging::{PageToken, Paging};
use crate::model::subscription::request::{Request, Target};
use crate::observe::Observe;
use crate::postgres::broadcast_history::BroadcastHistory;
use crate::postgres::connect::pool::Error;
use crate::postgres::connect::within::within;
use crate::postgres::snapshot_rows::{RowSink, RowsRead, Selection, SnapshotRows};

/// Number of channels that a router describes before it delivers further.
const DESCRIBED_AT_ONCE: usize = 32;

/// A session's handle on the feed.
#[derive(Clone)]
pub struct Feed {
    binder: Arc<Binder>,
    lanes: Arc<Lanes>,
    replay_reader: Arc<ReplayReader>,
    rows: Arc<SnapshotRows>,
    bookmarks: BookmarkHandle,
    history: Arc<BroadcastHistory>,
    observe: Arc<Observe>,
}

/// The result of reading rows.
pub struct RowsPage {
    /// The limit that was exceeded, if any, and the cursor.
    pub found: RowsRead,
    /// The last row, where the next page begins; `None` when rows have no order, no page was requested, or of several tables.
    pub last: Option<PageToken>,
    /// The columns of each table's key; empty if it has none that the role may read.
    pub keys: Vec<Vec<String>>,
}

/// Returns the first refusal of a table, as it is logged.
fn first_refusal(requests: &[Request], subscription: &Subscription) -> Option<String> {
    let role = subscription.identity().claims().role();
    requests.iter().zip(subscription.bindings()).find_map(|(request, binding)| {
        match (&request.target, &binding.scope) {
            (Target::Table { schema, table }, Scope::Refused(refused)) => {
                Some(refused.why.logged((schema, table), role))
            }
            _ => None,
        }
    })
}

impl Feed {
    /// Creates a handle.
    pub fn new(
        binder: Binder,
        lanes: Lanes,
        replay_reader: Arc<ReplayReader>,
        rows: SnapshotRows,
        bookmarks: BookmarkHandle,
        history: BroadcastHistory,
        observe: Arc<Observe>,
    ) -> Self {
        Self {
            binder: Arc::new(binder),
            lanes: Arc::new(lanes),
            replay_reader,
            rows: Arc::new(rows),
            bookmarks,
            history: Arc::new(history),
            observe,
        }
    }

    /// Binds each of a channel's requests to an identity.
    ///
    /// # Errors
    /// As [`Binder::bind`]; also when the client of the channel exceeds a limit.
    pub async fn bind(
        &self,
        channel: ChannelId,
        identity: Identity,
        requests: &[Request],
    ) -> Result<Subscription, BindError> {
        let subscription = self.binder.bind(identity, requests).await?;
        self.lanes.admit(channel, &subscription).map_err(BindError::Refused)?;
        if let Some(refusal) = first_refusal(requests, &subscription) {
            self.observe.subscription_refused(subscription.identity().claims().sub(), &refusal);
        }
        self.observe.hides(subscription.hidden().map(str::to_owned));
        Ok(subscription)
    }

    /// Returns schema and name of a table of a subscription that has no key.
    ///
    /// # Errors
    /// When PostgreSQL does not answer.
    pub async fn without_key(&self, subscription: &Subscription) -> Result<Option<(String, String)>, Error> {
        let role = subscription.identity().claims().role();
        let catalog = self.binder.catalog().with_role(role).await?;
        let mut keyless = catalog
            .relations()
            .filter(|relation| relation.key.is_empty() && subscription.concerning(relation).next().is_some());
        Ok(keyless.next().map(|relation| (relation.schema.clone(), relation.table.clone())))
    }

    /// Returns the stored broadcasts that a private channel wants again, and the cursor after them.
    ///
    /// # Errors
    /// When PostgreSQL does not answer in time.
    pub async fn recall(&self, channel: &str, recall: Recall) -> Result<Recalled, BindError> {
        let milliseconds = i128::from(recall.since).saturating_mul(1_000_000);
        // Nothing is of a time that has no date.
        let since = OffsetDateTime::from_unix_timestamp_nanos(milliseconds)
            .unwrap_or(PrimitiveDateTime::MAX.assume_utc());
        let read =
            within(BIND_TIMEOUT, "the stored broadcasts", self.history.newest(channel, since, recall.limit));
        read.await.map_err(|error| {
            tracing::warn!(error = %error, "stored broadcasts not read");
            BindError::Unavailable
        })
    }

    /// Starts delivery to a channel, or changes its subscription; `greeting` goes out first.
    pub fn join(&self, channel: ChannelId, subscriber: Subscriber, greeting: Vec<Frame>) {
        self.send(Command::Join { channel, subscriber, greeting });
    }

    /// Ends delivery to a channel; `farewell` goes out after everything delivered before.
    pub fn leave(&self, channel: ChannelId, outbox: &Arc<Outbox>, farewell: Vec<Frame>) {
        self.send(Command::Leave { channel, outbox: Arc::clone(outbox), farewell, reply: None });
    }

    /// Returns the positions of channels of one client, and of the feed; `None` while the changelog is not being
    /// read. The frame in `then` is queued after everything before these positions.
    pub async fn position(
        &self,
        channels: Vec<ChannelId>,
        trailing_frame: Option<(Arc<Outbox>, Frame)>,
    ) -> Option<DeliveredUpTo> {
        let mut lists = self.lanes.by_router(channels).into_iter().peekable();
        let mut trailing_frame = trailing_frame;
        let mut found: Option<DeliveredUpTo> = None;
        while let Some(channels) = lists.next() {
            // A frame after the last lane's answer comes after the changes of all lanes.
            let trailing_frame = if lists.peek().is_none() { trailing_frame.take() } else { None };
            let (reply, receiver) = oneshot::channel();
            self.send(Command::DeliveredUpTo { channels, trailing_frame, reply });
            if let Ok(position) = receiver.await {
                match &mut found {
                    Some(found) => found.channels.extend(position.channels),
                    None => found = Some(position),
                }
            }
        }
        found
    }

    /// Returns who follows a relation now, those with the most channels first: one entry for each set of claims and filter.
    pub async fn readers(&self, relation: &Arc<Relation>) -> Vec<Reader> {
        let mut merged: HashMap<(Identity, Option<String>), Reader> = HashMap::new();
        for reader in self.lanes.readers(relation).await {
            let key =
                (reader.identity.clone(), reader.filter.as_ref().map(|filter| filter.condition.clone()));
            let channels = reader.channels;
            let known = merged.entry(key).or_insert(Reader { channels: 0, ..reader });
            known.channels += channels;
        }
        let mut readers: Vec<Reader> = merged.into_values().collect();
        readers.sort_by_key(|reader| {
            (Reverse(reader.channels), reader.identity.claims().sub().map(str::to_owned))
        });
        readers
    }

    /// Returns what channels subscribe to, and where they are; unknown ones are left out. A router is asked for a few at a time, so
    /// that delivery goes on in between.
    pub async fn describe(&self, channels: Vec<ChannelId>) -> Vec<ChannelDescription> {
        let mut described = Vec::with_capacity(channels.len());
        for list in self.lanes.by_router(channels) {
            for few in list.chunks(DESCRIBED_AT_ONCE) {
                let (reply, receiver) = oneshot::channel();
                self.send(Command::Describe { channels: few.to_vec(), reply });
                described.extend(receiver.await.unwrap_or_default());
            }
        }
        described
    }

    /// Waits until all earlier commands are handled.
    pub async fn settled(&self) {
        self.lanes.settled().await;
    }

    /// Returns the feed's position once the tables of the subscription have their current names there; `None` on
    /// timeout.
    pub async fn beginning(&self, subscription: &Subscription) -> Option<Cursor> {
        let attempts = async {
            loop {
                let position = self.position_soon().await?;
                if !subscription.is_younger_than(&position) {
                    return Some(position);
                }
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(BIND_TIMEOUT, attempts).await.ok().flatten()
    }

    /// Returns the feed's position once the changelog is read; `None` on timeout.
    pub async fn position_soon(&self) -> Option<Cursor> {
        let attempts = async {
            loop {
                if let Some(position) = self.position(Vec::new(), None).await {
                    return position.feed;
                }
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(BIND_TIMEOUT, attempts).await.ok()
    }

    /// Takes over a bookmark, or creates it at the feed's position, unless it is not `wanted` any more by then.
    ///
    /// # Errors
    /// When PostgreSQL does not answer in time.
    pub async fn bookmark(
        &self,
        key: BookmarkKey,
        wanted: impl FnOnce() -> bool,
    ) -> Result<Opened, BindError> {
        let opened = async {
            let position = self.position_soon().await.filter(|_| wanted())?;
            let opened = self.bookmarks.open(key, position.clone()).await;
            // A new bookmark is where the feed is.
            if matches!(&opened, Some(Opened::At(_, cursor)) if *cursor != position) {
                self.observe.resumed_session();
            }
            opened
        };
        timeout(BIND_TIMEOUT, opened).await.ok().flatten().ok_or(BindError::Unavailable)
    }

    /// Returns the handle on bookmarks.
    pub fn bookmarks(&self) -> &BookmarkHandle {
        &self.bookmarks
    }

    /// Reads up to `limit` rows of the tables of a subscription that it may see now, each with its page, and the cursor to continue
    /// from.
    ///
    /// # Errors
    /// As [`SnapshotRows::read`]; also when a table is gone, or cannot be ordered as requested.
    pub async fn rows(
        &self,
        subscription: &Subscription,
        pages: &[Paging],
        limit: RowLimit,
        take: RowSink<'_>,
    ) -> Result<RowsPage, RequestError> {
        let claims = subscription.identity().claims();
        let catalog = self.binder.catalog().with_role(claims.role());
        let catalog = within(BIND_TIMEOUT, "the catalog", catalog).await?;
        let (mut selections, mut selects) = (Vec::new(), Vec::new());
        for (binding, paging) in subscription.bindings().iter().zip(pages) {
            selections.push(self.selection(&catalog, claims.role(), binding, paging).await?);
            selects.push(binding.select.as_deref());
        }
        let mut last_row = String::new();
        let mut count = 0;
        let page_limit = pages.first().and_then(|paging| paging.limit);
        let mut take = |table: usize, row: &str| {
            count += 1;
            if Some(count) == page_limit && table == 0 {
                row.clone_into(&mut last_row);
            }
            let Selection { relation, access, .. } = &selections[table];
            match record(row, relation, access, selects[table]) {
                Some(stripped) => take(table, &stripped),
                None => take(table, row),
            }
        };
        let found = self.rows.read(claims, &selections, limit, &mut take).await?;
        let keys: Vec<Vec<String>> = selections.iter().map(Selection::readable_key).collect();
        let last = match (selections.as_slice(), keys.as_slice()) {
            ([selection], [key]) if !key.is_empty() => PageToken::of(&selection.order, &last_row),
            _ => None,
        };
        Ok(RowsPage { found, last, keys })
    }

    /// Returns what to read of a binding's table.
    async fn selection<'a>(
        &self,
        catalog: &'a Catalog,
        role: &str,
        binding: &'a Binding,
        paging: &Paging,
    ) -> Result<Selection<'a>, RequestError> {
        let relation = match binding.scope {
            Scope::Relation(id, oid, ..) => catalog.relation(id).filter(|relation| relation.oid == oid),
            Scope::Refused(_) | Scope::Named(_) | Scope::Schema(_) | Scope::All => None,
        };
        let access = relation.and_then(|relation| relation.access(role));
        let (Some(relation), Some(access)) = (relation, access) else {
            return Err(Error::Unfit(String::from("the table is gone")).into());
        };
        let order = paging.order(relation, access, role)?;
        let after = self.binder.after(paging, &order, relation).await?;
        let filter = binding.filter.as_ref().map(|filter| filter.condition.clone());
        let conditions = filter.into_iter().chain(after).collect();
        Ok(Selection { relation, access, conditions, order, limit: paging.limit })
    }

    pub(super) fn send(&self, command: Command) {
        self.lanes.send(command);
    }

    pub(super) fn replay_reader(&self) -> Arc<ReplayReader> {
        Arc::clone(&self.replay_reader)
    }
}
