//! Puts questions about private channels to PostgreSQL, as many together as wait.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::model::catalog::relation::{Access, Relation};
use crate::model::catalog::topic_rules::TopicRights;
use crate::model::policy::claim_expr::ClaimValue;
use crate::model::policy::plan::ServerQuery;
use crate::model::policy::predicate::Answers;
use crate::model::policy::visibility::{Denied, Identity};
use crate::model::row::image::Image;
use crate::model::row::truth::Truth;
use crate::observe::Observe;
use crate::postgres::connect::pool::Error;
use crate::postgres::evaluate::pairs::{Pair, PairEvaluator, PairQuery};
use crate::postgres::evaluate::per_identity::{IdentityAnswer, IdentityEvaluator, IdentityQuery, reading};

/// Maximum number of questions that are put together.
const MAX_BATCH: usize = 256;
/// Maximum number of them from one identity.
const MAX_OF_IDENTITY: usize = 16;

/// A question that only PostgreSQL can answer.
pub struct Question {
    /// The table with the policies. Another one when they change.
    pub relation: Arc<Relation>,
    /// Who asks.
    pub identity: Identity,
    /// The name of the channel.
    pub channel: String,
    /// The rows that are asked about.
    pub images: [String; 2],
    /// The claims that the policies read.
    pub values: Vec<ClaimValue>,
    /// Takes the answer. Dropped if there is none.
    pub reply: oneshot::Sender<RightsAnswer>,
}

/// The answer to a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RightsAnswer {
    /// What is allowed.
    Rights(TopicRights),
    /// Unknown: a table that the policies read is locked.
    Locked,
}

/// Queues of questions.
#[derive(Clone)]
pub struct QuestionQueues {
    first: mpsc::UnboundedSender<Question>,
    /// Questions of those who are allowed already.
    rechecks: mpsc::UnboundedSender<Question>,
}

/// Takes the questions from their queues. Workers share it, one takes at a time.
pub struct WaitingQuestions {
    first: mpsc::UnboundedReceiver<Question>,
    rechecks: mpsc::UnboundedReceiver<Question>,
    /// Questions beyond [`MAX_OF_IDENTITY`], for a later batch.
    later: VecDeque<Question>,
}

/// A batch being filled.
#[derive(Default)]
struct QuestionBatch {
    questions: Vec<Question>,
    counts: HashMap<Identity, usize>,
}

/// Puts questions to PostgreSQL, over its own connections.
pub struct TopicWorker {
    pairs: PairEvaluator,
    identities: IdentityEvaluator,
    observe: Arc<Observe>,
    /// The rules of the last question: statements are prepared anew for others.
    rules: Vec<Arc<Relation>>,
}

impl QuestionQueues {
    /// Creates empty queues.
    pub fn new() -> (Self, WaitingQuestions) {
        let (first, first_waiting) = mpsc::unbounded_channel();
        let (rechecks, rechecks_waiting) = mpsc::unbounded_channel();
        (
            Self { first, rechecks },
            WaitingQuestions { first: first_waiting, rechecks: rechecks_waiting, later: VecDeque::new() },
        )
    }

    /// Adds a question.
    pub fn add(&self, question: Question, is_recheck: bool) {
        let queue = if is_recheck { &self.rechecks } else { &self.first };
        // Without a worker the question is dropped, which its asker notices.
        let _ = queue.send(question);
    }
}

impl WaitingQuestions {
    /// Waits for a question, and returns it with those that wait, too. `None` when no more can come.
    async fn next(&mut self) -> Option<Vec<Question>> {
        loop {
            let mut batch = QuestionBatch::default();
            for question in std::mem::take(&mut self.later) {
                self.later.extend(batch.add(question));
            }
            if batch.questions.is_empty() {
                let question = tokio::select! {
                    biased;
                    question = self.first.recv() => question?,
                    question = self.rechecks.recv() => question?,
                };
                self.later.extend(batch.add(question));
            }
            for queue in [&mut self.first, &mut self.rechecks] {
                while batch.questions.len() < MAX_BATCH
                    && let Ok(question) = queue.try_recv()
                {
                    self.later.extend(batch.add(question));
                }
            }
            if !batch.questions.is_empty() {
                return Some(batch.questions);
            }
        }
    }
}

impl QuestionBatch {
    /// Adds a question whose asker still waits. Returns it if it is for a later batch: one identity's questions, which may be slow,
    /// leave room for those of others.
    fn add(&mut self, question: Question) -> Option<Question> {
        if question.reply.is_closed() {
            return None;
        }
        let count = self.counts.entry(question.identity.clone()).or_default();
        if *count >= MAX_OF_IDENTITY || self.questions.len() >= MAX_BATCH {
            return Some(question);
        }
        *count += 1;
        self.questions.push(question);
        None
    }
}

/// Evaluates a policy on an image, as far as the answers of PostgreSQL are known.
pub fn decide(
    relation: &Relation,
    access: &Access,
    image: &str,
    values: &[ClaimValue],
    answers: &dyn Answers,
) -> Truth {
    if access.plan.raises(values) {
        return Truth::Error;
    }
    let Ok(image) = Image::parse(image, &relation.columns) else { return Truth::Error };
    match access.plan.predicate.truth(&image, values, answers, true) {
        Truth::True | Truth::Error if access.plan.needs_probe(values) => Truth::Undecided,
        truth => truth,
    }
}

/// The answers for one image of a question, by query of the plan.
struct PairAnswers<'a>(&'a [HashMap<(usize, usize), Truth>], (usize, usize));

impl Answers for PairAnswers<'_> {
    fn fact(&self, query: usize) -> Truth {
        self.0.get(query).and_then(|answers| answers.get(&self.1)).copied().unwrap_or(Truth::Undecided)
    }

    fn reads(&self, query: usize) -> Truth {
        self.fact(query)
    }
}

impl TopicWorker {
    /// Creates a worker with these connections.
    pub fn new(pairs: PairEvaluator, identities: IdentityEvaluator, observe: Arc<Observe>) -> Self {
        Self { pairs, identities, observe, rules: Vec::new() }
    }

    /// Answers questions until `end`.
    pub async fn run(mut self, waiting: Arc<tokio::sync::Mutex<WaitingQuestions>>, end: CancellationToken) {
        let answering = async {
            loop {
                let batch = waiting.lock().await.next().await;
                let Some(batch) = batch else { return };
                // Without an answer the askers try again.
                if let Err(error) = self.answer(batch).await {
                    tracing::warn!(error = %error, "private channels not authorized, retrying");
                }
            }
        };
        let _: Option<()> = end.run_until_cancelled(answering).await;
    }

    async fn answer(&mut self, batch: Vec<Question>) -> Result<(), Error> {
        self.prepare(&batch).await;
        let mut by_rules: HashMap<(usize, String), Vec<Question>> = HashMap::new();
        for question in batch {
            let role = question.identity.claims().role().to_owned();
            let key = (Arc::as_ptr(&question.relation).addr(), role);
            by_rules.entry(key).or_default().push(question);
        }
        for ((_, role), questions) in by_rules {
            let Some(first) = questions.first() else { continue };
            let relation = Arc::clone(&first.relation);
            let Some(access) = relation.access(&role) else { continue };
            let truths = self.ask_for_all(&relation, access, &role, &questions).await?;
            self.ask_for_each(&relation, access, questions, truths).await?;
        }
        Ok(())
    }

    /// Discards prepared statements if the rules are others than those of the last batch.
    async fn prepare(&mut self, batch: &[Question]) {
        let is_known =
            |question: &Question| self.rules.iter().any(|known| Arc::ptr_eq(known, &question.relation));
        if batch.iter().all(is_known) {
            return;
        }
        self.pairs.forget().await;
        self.identities.discard_plans().await;
        self.rules.clear();
        for question in batch {
            if !self.rules.iter().any(|known| Arc::ptr_eq(known, &question.relation)) {
                self.rules.push(Arc::clone(&question.relation));
            }
        }
    }

    /// Puts the queries of a plan for all questions at once. Returns what is known then, for each question and image.
    async fn ask_for_all(
        &self,
        relation: &Relation,
        access: &Access,
        role: &str,
        questions: &[Question],
    ) -> Result<Vec<[Truth; 2]>, Error> {
        let plan = &access.plan;
        let mut answers = Vec::with_capacity(plan.queries.len());
        for query in &plan.queries {
            let (mut pairs, mut slots) = (Vec::new(), Vec::new());
            for (number, question) in questions.iter().enumerate() {
                let Some(values) = texts(query, &question.values) else { continue };
                for (at, image) in question.images.iter().enumerate() {
                    pairs.push(Pair { image, values: values.clone() });
                    slots.push((number, at));
                }
            }
            let reads_as = plan.reads_as.as_deref();
            let truths =
                self.pairs.ask(&PairQuery { relation, role, reads_as, query, pairs: &pairs }).await?;
            self.observe.judged(usize::from(!pairs.is_empty()));
            answers.push(slots.into_iter().zip(truths).collect());
        }
        let truth = |number: usize, question: &Question| {
            [0, 1].map(|at| {
                let answers = PairAnswers(&answers, (number, at));
                decide(relation, access, &question.images[at], &question.values, &answers)
            })
        };
        Ok(questions.iter().enumerate().map(|(number, question)| truth(number, question)).collect())
    }

    /// Answers the questions, those that are still undecided by a statement for each identity and channel. An identity has one
    /// statement at a time, so that its slow ones do not add up before the others.
    async fn ask_for_each(
        &self,
        relation: &Relation,
        access: &Access,
        questions: Vec<Question>,
        truths: Vec<[Truth; 2]>,
    ) -> Result<(), Error> {
        let mut rounds: Vec<Vec<(Question, [Truth; 2])>> = Vec::new();
        let mut counts: HashMap<Identity, usize> = HashMap::new();
        for (question, truths) in questions.into_iter().zip(truths) {
            if !truths.contains(&Truth::Undecided) {
                reply(question, truths);
                continue;
            }
            let count = counts.entry(question.identity.clone()).or_default();
            if rounds.len() <= *count {
                rounds.push(Vec::new());
            }
            rounds[*count].push((question, truths));
            *count += 1;
        }
        for mut round in rounds {
            round.retain(|(question, _)| !question.reply.is_closed());
            self.ask_round(relation, access, round).await?;
        }
        Ok(())
    }

    async fn ask_round(
        &self,
        relation: &Relation,
        access: &Access,
        round: Vec<(Question, [Truth; 2])>,
    ) -> Result<(), Error> {
        let Some(statement) = &access.judge else { return Ok(()) };
        let reading: Arc<str> = reading(relation).into();
        let queries = round.iter().map(|(question, _)| IdentityQuery {
            identity: question.identity.clone(),
            statement: Arc::clone(statement),
            images: &question.images,
            reading: Arc::clone(&reading),
            with_path: access.rights.calls_user_functions,
            topic: Some(&question.channel),
        });
        let queries: Vec<IdentityQuery<'_>> = queries.collect();
        let answers = self.identities.judge(&queries).await?;
        self.observe.judged(queries.len());
        for ((question, mut truths), IdentityAnswer { allowed, denied, .. }) in round.into_iter().zip(answers)
        {
            if let Some(denied) = denied {
                self.observe.judgement_failed(denied, &relation.table);
            }
            if denied == Some(Denied::Locked) {
                let _ = question.reply.send(RightsAnswer::Locked);
                continue;
            }
            for (truth, allowed) in truths.iter_mut().zip(allowed) {
                if *truth == Truth::Undecided {
                    *truth = allowed.into();
                }
            }
            reply(question, truths);
        }
        Ok(())
    }
}

fn reply(question: Question, truths: [Truth; 2]) {
    let rights = TopicRights::of(truths.map(|truth| truth == Truth::True));
    let answer = if truths.contains(&Truth::TimedOut) && !rights.any() {
        RightsAnswer::Locked
    } else {
        RightsAnswer::Rights(rights)
    };
    let _ = question.reply.send(answer);
}

/// Returns the texts of the claims that identify a reader; `None` if one of them is not a value.
fn texts(query: &ServerQuery, values: &[ClaimValue]) -> Option<Vec<Arc<str>>> {
    let text = |(claim, _): &(usize, _)| match values.get(*claim) {
        Some(ClaimValue::One(datum)) if datum.is_short() => Some(datum.to_text()),
        _ => None,
    };
    query.by().iter().map(text).collect()
}
