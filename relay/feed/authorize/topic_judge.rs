//! Decides what identities may do in private channels, by the policies of `realtime.messages`.
//!
//! A policy that reads only claims and the channel is decided here. Questions about others wait for each other: those that wait
//! together are put to PostgreSQL together.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::{oneshot, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::feed::authorize::topic_questions::{Question, QuestionQueues, RightsAnswer, decide};
use crate::feed::subscribe::BIND_TIMEOUT;
use crate::model::catalog::topic_rules::{TopicAct, TopicRights, images};
use crate::model::policy::predicate::NoAnswers;
use crate::model::policy::visibility::Identity;
use crate::model::row::truth::Truth;
use crate::model::session::private::VERDICT_SECONDS;
use crate::model::subscription::topic::TopicScope;
use crate::postgres::catalog::{CatalogCache, KnownTopicRules};
use crate::postgres::connect::pool::Error;

/// Minimum interval between two times at which all members are judged again because rules changed, or a table that they look into.
const RECHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Decides what identities may do in private channels.
pub struct TopicJudge {
    catalog: Arc<CatalogCache>,
    /// The rules, and how often they and what they look into have changed.
    state: watch::Receiver<KnownTopicRules>,
    queues: QuestionQueues,
    /// Changes when members are to be judged again.
    rechecks: watch::Sender<u64>,
}

/// A question about a private channel.
#[derive(Debug, Clone)]
pub struct TopicQuestion {
    /// Who asks.
    pub identity: Identity,
    /// The name of the channel.
    pub channel: String,
    /// What it wants to do.
    pub act: TopicAct,
    /// Whether it is allowed to already. Others are answered first.
    pub is_recheck: bool,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicVerdict {
    /// What is allowed.
    pub rights: TopicRights,
    /// Why nothing is, and what to do, if that is not for the policies to say.
    pub why: Option<String>,
    /// See [`TopicJudge::version`]; read before the rules were.
    pub version: u64,
}

/// PostgreSQL did not answer in time.
#[derive(Debug, PartialEq, Eq)]
pub struct TopicUnknown;

/// An outcome that is not final.
enum Unready {
    /// A table is locked, or the worker lost its connection.
    Again,
    Failed(Error),
}

impl From<Error> for Unready {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl TopicJudge {
    /// Creates a judge that puts its questions into these queues.
    pub fn new(catalog: Arc<CatalogCache>, queues: QuestionQueues) -> Arc<Self> {
        let state = catalog.topics();
        Arc::new(Self { catalog, state, queues, rechecks: watch::Sender::default() })
    }

    /// Returns a number that changes with the rules, and with the watched tables that they look into: verdicts of another number may
    /// be outdated.
    pub fn version(&self) -> u64 {
        self.state.borrow().version
    }

    /// Changes when members are to be judged again.
    pub fn rechecks(&self) -> watch::Receiver<u64> {
        self.rechecks.subscribe()
    }

    /// Tells members to be judged again after the rules changed, but not more often than they can be.
    pub async fn run(self: Arc<Self>, end: CancellationToken) {
        let mut state = self.state.clone();
        let watching = async {
            while state.changed().await.is_ok() {
                self.rechecks.send_modify(|count| *count += 1);
                sleep(RECHECK_INTERVAL).await;
            }
        };
        let _: Option<()> = end.run_until_cancelled(watching).await;
    }

    /// Answers a question, retrying while the connection fails or a table is locked, up to a time limit.
    ///
    /// # Errors
    /// When PostgreSQL does not answer.
    pub async fn judge(&self, question: &TopicQuestion) -> Result<TopicVerdict, TopicUnknown> {
        let attempts = async {
            let mut pause = Duration::from_millis(50);
            loop {
                match self.try_judge(question).await {
                    Ok(verdict) => return Ok(verdict),
                    Err(Unready::Failed(error)) if !error.is_transient() => {
                        tracing::warn!(error = %error, "private channel not authorized");
                        return Err(TopicUnknown);
                    }
                    Err(Unready::Failed(error)) => {
                        tracing::debug!(error = %error, "private channel not authorized, retrying");
                    }
                    Err(Unready::Again) => {}
                }
                sleep(pause).await;
                pause *= 2;
            }
        };
        timeout(BIND_TIMEOUT, attempts).await.unwrap_or(Err(TopicUnknown))
    }

    /// Returns when an identity may not read the broadcasts of a topic any more, or PostgreSQL does not answer. For a public topic, and
    /// without one, never.
    pub async fn lost(self: Arc<Self>, identity: Identity, topic: Option<TopicScope>) {
        let Some(topic) = topic.filter(|topic| topic.is_private) else { return pending().await };
        let channel = topic.name.to_string();
        let question = TopicQuestion { identity, channel, act: TopicAct::Read, is_recheck: true };
        let mut rechecks = self.rechecks();
        loop {
            let _ = timeout(Duration::from_secs(VERDICT_SECONDS), rechecks.changed()).await;
            match self.judge(&question).await {
                Ok(verdict) if verdict.rights.broadcast => {}
                Ok(_) | Err(TopicUnknown) => return,
            }
        }
    }

    async fn try_judge(&self, question: &TopicQuestion) -> Result<TopicVerdict, Unready> {
        let TopicQuestion { identity, channel, act, is_recheck } = question;
        let version = self.version();
        let verdict = |rights, why| Ok(TopicVerdict { rights, why, version });
        // The database's text cannot have it, and a statement with it would fail.
        let is_text = !channel.contains('\0')
            && self.catalog.has_characters_of(identity.claims()).await?
            && self.catalog.has_characters(channel).await?;
        if !is_text {
            let why = "the token or the name has a character that the database's encoding does not have";
            return verdict(TopicRights::default(), Some(why.to_owned()));
        }
        let role = identity.claims().role();
        let catalog = self.catalog.with_role(role).await?;
        let Some(rules) = catalog.topics() else {
            let why =
                "the table realtime.messages, whose policies say who may use it, is missing: relay install";
            return verdict(TopicRights::default(), Some(why.to_owned()));
        };
        let access = match rules.access(*act, role) {
            Ok(access) if access.pending => return Err(Unready::Again),
            Ok(access) => access,
            Err(why) => return verdict(TopicRights::default(), Some(why)),
        };
        let relation = rules.relation(*act);
        let now = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
        let images = images(relation, channel, &now);
        let values = access.plan.values(identity.claims());
        let truths = [0, 1].map(|at| decide(relation, access, &images[at], &values, &NoAnswers));
        if !truths.contains(&Truth::Undecided) {
            return verdict(TopicRights::of(truths.map(|truth| truth == Truth::True)), None);
        }
        let (reply, answer) = oneshot::channel();
        let question = Question {
            relation: Arc::clone(relation),
            identity: identity.clone(),
            channel: channel.clone(),
            images,
            values,
            reply,
        };
        self.queues.add(question, *is_recheck);
        match answer.await {
            Ok(RightsAnswer::Rights(rights)) => verdict(rights, None),
            Ok(RightsAnswer::Locked) | Err(_) => Err(Unready::Again),
        }
    }
}
