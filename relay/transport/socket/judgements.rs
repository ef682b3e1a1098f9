//! The questions of a client's private channels that wait for the topic judge.

use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;

use crate::feed::authorize::topic_judge::{TopicJudge, TopicQuestion, TopicUnknown, TopicVerdict};
use crate::model::catalog::topic_rules::TopicAct;
use crate::model::session::channel::ChannelId;
use crate::model::session::message::Incoming;
use crate::model::session::private::WriteQuestion;

/// The outcome of a judgement of what a channel may read: the channel, the number of the judgement, and the verdict.
pub type ReadJudgement = (ChannelId, u32, Result<TopicVerdict, TopicUnknown>);
/// The answer to whether a channel may write.
pub type WriteJudgement = (WriteQuestion, Result<TopicVerdict, TopicUnknown>);

/// What the private channels of one client may read, while it is judged.
pub struct Judgements {
    judge: Arc<TopicJudge>,
    reads: FuturesUnordered<BoxFuture<'static, ReadJudgement>>,
}

impl Judgements {
    /// Creates the judgements of a new client: none.
    pub fn new(judge: Arc<TopicJudge>) -> Self {
        Self { judge, reads: FuturesUnordered::new() }
    }

    /// Starts to judge what a channel may read.
    pub fn begin(&mut self, channel: ChannelId, judgement: u32, question: TopicQuestion) {
        let judge = Arc::clone(&self.judge);
        let judged = async move { (channel, judgement, judge.judge(&question).await) };
        self.reads.push(judged.boxed());
    }

    /// Returns the number of judgements that are not finished.
    pub fn pending(&self) -> usize {
        self.reads.len()
    }

    /// Waits for the next outcome; `None` if nothing is judged. Cancel safe.
    pub async fn next(&mut self) -> Option<ReadJudgement> {
        self.reads.next().await
    }

    /// Returns the version of the rules: verdicts of another one may be outdated.
    pub fn version(&self) -> u64 {
        self.judge.version()
    }

    /// Returns a message once it is known whether its channel may write.
    pub fn may_write(
        &self,
        question: WriteQuestion,
        message: Incoming,
    ) -> impl Future<Output = (Incoming, Option<WriteJudgement>)> + use<> {
        let judge = Arc::clone(&self.judge);
        async move {
            let asked = TopicQuestion {
                identity: question.identity.clone(),
                channel: question.name.clone(),
                act: TopicAct::Write,
                is_recheck: false,
            };
            let verdict = judge.judge(&asked).await;
            (message, Some((question, verdict)))
        }
    }
}
