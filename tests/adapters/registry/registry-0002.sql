BEGIN TRANSACTION;
CREATE TABLE adapters (
	id INTEGER NOT NULL, 
	base_id VARCHAR NOT NULL, 
	tenant VARCHAR NOT NULL, 
	name VARCHAR NOT NULL, 
	active VARCHAR, 
	pinned BOOLEAN NOT NULL, 
	created_at DOUBLE NOT NULL, 
	updated_at DOUBLE NOT NULL, 
	changed BIGINT NOT NULL, 
	CONSTRAINT pk_adapters PRIMARY KEY (id), 
	CONSTRAINT uq_adapters_base_id_tenant_name UNIQUE (base_id, tenant, name)
);
INSERT INTO "adapters" VALUES(1,'base-1','default','acme','3333d8b9e30059fa340f93c2ecf87264da24e979c31a542b3ad97b73b097b3c7',1,1.79568549864631938e+09,1.79568549896572732e+09,12);
INSERT INTO "adapters" VALUES(2,'base-1','default','legal',NULL,0,1.79568549899067544e+09,1.79568549916661262e+09,17);
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0002');
CREATE TABLE bases (
	id VARCHAR NOT NULL, 
	name TEXT NOT NULL, 
	CONSTRAINT pk_bases PRIMARY KEY (id)
);
INSERT INTO "bases" VALUES('base-1','base');
CREATE TABLE change_counter (
	id INTEGER NOT NULL, 
	value BIGINT NOT NULL, 
	CONSTRAINT pk_change_counter PRIMARY KEY (id)
);
INSERT INTO "change_counter" VALUES(1,17);
CREATE TABLE history (
	id INTEGER NOT NULL, 
	adapter_id INTEGER NOT NULL, 
	action VARCHAR NOT NULL, 
	version VARCHAR, 
	previous VARCHAR, 
	actor VARCHAR NOT NULL, 
	at DOUBLE NOT NULL, 
	CONSTRAINT pk_history PRIMARY KEY (id), 
	CONSTRAINT fk_history_adapter_id FOREIGN KEY(adapter_id) REFERENCES adapters (id) ON DELETE CASCADE
);
INSERT INTO "history" VALUES(1,1,'activate','55e3414fd97e961f42f6ab0a8bc4d6779de798b2e817324b756e8d9bd671384e',NULL,'anna',1.79568549884641647e+09);
INSERT INTO "history" VALUES(2,1,'activate','3333d8b9e30059fa340f93c2ecf87264da24e979c31a542b3ad97b73b097b3c7','55e3414fd97e961f42f6ab0a8bc4d6779de798b2e817324b756e8d9bd671384e','anna',1.7956854988785789e+09);
INSERT INTO "history" VALUES(3,1,'activate','45e6f843a8bd36c41ac5a13c629972769ac8e7bdd4473a4a33dc30db7e000527','3333d8b9e30059fa340f93c2ecf87264da24e979c31a542b3ad97b73b097b3c7','',1.79568549890674257e+09);
INSERT INTO "history" VALUES(4,1,'rollback','3333d8b9e30059fa340f93c2ecf87264da24e979c31a542b3ad97b73b097b3c7','45e6f843a8bd36c41ac5a13c629972769ac8e7bdd4473a4a33dc30db7e000527','ben',1.79568549893815159e+09);
CREATE TABLE previous_versions (
	id INTEGER NOT NULL, 
	adapter_id INTEGER NOT NULL, 
	version_id INTEGER NOT NULL, 
	CONSTRAINT pk_previous_versions PRIMARY KEY (id), 
	CONSTRAINT fk_previous_versions_adapter_id FOREIGN KEY(adapter_id) REFERENCES adapters (id) ON DELETE CASCADE, 
	CONSTRAINT fk_previous_versions_version_id FOREIGN KEY(version_id) REFERENCES versions (id) ON DELETE CASCADE
);
INSERT INTO "previous_versions" VALUES(1,1,1);
CREATE TABLE training_checkpoints (
	number INTEGER NOT NULL, 
	job INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	path TEXT NOT NULL, 
	at DOUBLE NOT NULL, 
	train_loss DOUBLE, 
	valid_loss DOUBLE, 
	CONSTRAINT pk_training_checkpoints PRIMARY KEY (number), 
	CONSTRAINT fk_training_checkpoints_job FOREIGN KEY(job) REFERENCES training_jobs (number) ON DELETE CASCADE, 
	CONSTRAINT uq_training_checkpoints_job_step UNIQUE (job, step)
);
INSERT INTO "training_checkpoints" VALUES(1,1,4,'checkpoint-4',1700000003.0,1.5,1.25);
CREATE TABLE training_events (
	number INTEGER NOT NULL, 
	job INTEGER NOT NULL, 
	at DOUBLE NOT NULL, 
	level VARCHAR NOT NULL, 
	kind VARCHAR NOT NULL, 
	message TEXT NOT NULL, 
	data JSON, 
	CONSTRAINT pk_training_events PRIMARY KEY (number), 
	CONSTRAINT fk_training_events_job FOREIGN KEY(job) REFERENCES training_jobs (number) ON DELETE CASCADE
);
INSERT INTO "training_events" VALUES(1,1,1700000000.0,'info','message','Created fine-tuning job.',NULL);
INSERT INTO "training_events" VALUES(2,2,1700000000.0,'info','message','Created fine-tuning job.',NULL);
INSERT INTO "training_events" VALUES(3,3,1700000000.0,'info','message','Created fine-tuning job.',NULL);
INSERT INTO "training_events" VALUES(4,4,1700000000.0,'info','message','Created fine-tuning job.',NULL);
INSERT INTO "training_events" VALUES(5,1,1700000001.0,'info','message','The files are valid.',NULL);
INSERT INTO "training_events" VALUES(6,1,1700000002.0,'info','message','Training began.',NULL);
INSERT INTO "training_events" VALUES(7,1,1700000003.0,'info','metrics','Step 4/8','{"step": 4, "train_loss": 1.5}');
INSERT INTO "training_events" VALUES(8,1,1700000004.0,'info','message','Done.',NULL);
INSERT INTO "training_events" VALUES(9,2,1700000005.0,'error','message','Line 3 is no JSON.',NULL);
CREATE TABLE training_files (
	number INTEGER NOT NULL, 
	id VARCHAR NOT NULL, 
	tenant VARCHAR NOT NULL, 
	server VARCHAR NOT NULL, 
	purpose VARCHAR NOT NULL, 
	filename TEXT NOT NULL, 
	bytes BIGINT NOT NULL, 
	created_at DOUBLE NOT NULL, 
	CONSTRAINT pk_training_files PRIMARY KEY (number), 
	CONSTRAINT uq_training_files_id UNIQUE (id)
);
INSERT INTO "training_files" VALUES(1,'file-1','default','server-1','fine-tune','train.jsonl',1234,1700000000.0);
INSERT INTO "training_files" VALUES(2,'file-2','default','server-1','fine-tune-results','ftjob-1.csv',99,1700000100.0);
CREATE TABLE training_jobs (
	number INTEGER NOT NULL, 
	id VARCHAR NOT NULL, 
	base_id VARCHAR NOT NULL, 
	tenant VARCHAR NOT NULL, 
	server VARCHAR NOT NULL, 
	name VARCHAR NOT NULL, 
	state VARCHAR NOT NULL, 
	training_file VARCHAR NOT NULL, 
	validation_file VARCHAR, 
	activate VARCHAR NOT NULL, 
	settings JSON NOT NULL, 
	labels JSON NOT NULL, 
	created_at DOUBLE NOT NULL, 
	started_at DOUBLE, 
	finished_at DOUBLE, 
	"plan" JSON, 
	progress JSON, 
	report JSON, 
	error_code VARCHAR, 
	error_message TEXT, 
	error_param VARCHAR, 
	saved_step INTEGER NOT NULL, 
	deaths INTEGER NOT NULL, 
	death_step INTEGER NOT NULL, 
	version VARCHAR, 
	activated BOOLEAN, 
	result_file VARCHAR, 
	CONSTRAINT pk_training_jobs PRIMARY KEY (number), 
	CONSTRAINT uq_training_jobs_id UNIQUE (id)
);
INSERT INTO "training_jobs" VALUES(1,'ftjob-1','base-1','default','server-1','acme','succeeded','file-1',NULL,'if_better','{"r": 16, "targets": ["q_proj"]}','{"team": "support"}',1.79568549925693106e+09,1.79568549944307923e+09,1.7956854994848361e+09,'{"steps": 8}','{"step": 4}','{"better": true}',NULL,NULL,NULL,4,0,0,'45e6f843a8bd36c41ac5a13c629972769ac8e7bdd4473a4a33dc30db7e000527',1,'file-2');
INSERT INTO "training_jobs" VALUES(2,'ftjob-2','base-1','default','server-1','acme','failed','file-1','file-1','if_better','{"r": 16, "targets": ["q_proj"]}','{"team": "support"}',1.7956854993070302e+09,NULL,1.79568549950267958e+09,NULL,NULL,NULL,'invalid_file','line 3 is no JSON','training_file',0,0,0,NULL,NULL,NULL);
INSERT INTO "training_jobs" VALUES(3,'ftjob-3','base-1','default','server-1','acme','paused','file-1',NULL,'if_better','{"r": 16, "targets": ["q_proj"]}','{"team": "support"}',1.79568549935515117e+09,NULL,NULL,'{"steps": 2}',NULL,NULL,NULL,NULL,NULL,0,0,0,NULL,NULL,NULL);
INSERT INTO "training_jobs" VALUES(4,'ftjob-4','base-1','default','server-1','acme','validating_files','file-1',NULL,'if_better','{"r": 16, "targets": ["q_proj"]}','{"team": "support"}',1.79568549939371514e+09,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,0,0,0,NULL,NULL,NULL);
CREATE TABLE versions (
	id INTEGER NOT NULL, 
	adapter_id INTEGER NOT NULL, 
	digest VARCHAR NOT NULL, 
	state VARCHAR NOT NULL, 
	config_sha256 VARCHAR NOT NULL, 
	config_size BIGINT NOT NULL, 
	weights_sha256 VARCHAR NOT NULL, 
	weights_size BIGINT NOT NULL, 
	prepared_sha256 VARCHAR, 
	prepared_size BIGINT, 
	report JSON, 
	modules JSON, 
	source JSON NOT NULL, 
	error_code VARCHAR, 
	error_message TEXT, 
	created_at DOUBLE NOT NULL, 
	created_by VARCHAR NOT NULL, 
	finished_at DOUBLE, 
	CONSTRAINT pk_versions PRIMARY KEY (id), 
	CONSTRAINT fk_versions_adapter_id FOREIGN KEY(adapter_id) REFERENCES adapters (id) ON DELETE CASCADE, 
	CONSTRAINT uq_versions_adapter_id_digest UNIQUE (adapter_id, digest)
);
INSERT INTO "versions" VALUES(1,1,'55e3414fd97e961f42f6ab0a8bc4d6779de798b2e817324b756e8d9bd671384e','ready','b79606fb3afea5bd1609ed40b622142f1c98125abcfe89a76a661b0e8e343910',6,'3bb63c501a2cb9b43bfbf09f0b02a7f12408e1922617522b8441afd37272b915',9,'f5e3074929c93e601a6416b524fd9af7ede6d46918f0560a3c68ba9b81fbc3c8',10,NULL,NULL,'{"kind": "upload"}',NULL,NULL,1.79568549864631938e+09,'',1.79568549870272731e+09);
INSERT INTO "versions" VALUES(2,1,'3333d8b9e30059fa340f93c2ecf87264da24e979c31a542b3ad97b73b097b3c7','ready','b79606fb3afea5bd1609ed40b622142f1c98125abcfe89a76a661b0e8e343910',6,'a8989317cf9287850260df63e5c4946861b8092ff02634fb4b3dab4f9fb1da56',9,'aeea6d3772f96ffdce1ab73256538234bd8c94ad4a9bc86da1035729bc788e34',10,NULL,NULL,'{"kind": "upload"}',NULL,NULL,1795685498.76026,'',1.79568549878838348e+09);
INSERT INTO "versions" VALUES(3,1,'45e6f843a8bd36c41ac5a13c629972769ac8e7bdd4473a4a33dc30db7e000527','ready','b79606fb3afea5bd1609ed40b622142f1c98125abcfe89a76a661b0e8e343910',6,'c0f72102132542cac58c33196b4a9f06d04a6454d48b0dc56ed8b00568fb7d84',9,'01c2cf7353e22fe00b09f58f9568eabf48e7c3a063f557adc02f5cc979e15aef',10,NULL,NULL,'{"kind": "upload"}',NULL,NULL,1.7956854988149116e+09,'',1.7956854988328638e+09);
INSERT INTO "versions" VALUES(4,2,'7f3cdb2d31c73b8a60d468c73fe02ce24036135e03220c33ecaa24a179197637','ready','b79606fb3afea5bd1609ed40b622142f1c98125abcfe89a76a661b0e8e343910',6,'7358b9e89fdeea3dbf55315de5c1cec00a1f85964fc3133de57d1efc5c28eb3f',9,'8c785a7cef53bca46c1bbd559582f9ccc3580270a8c6ebf4a153a98b5eda0bcd',10,NULL,NULL,'{"kind": "upload"}',NULL,NULL,1.79568549899067544e+09,'',1.7956854990307641e+09);
INSERT INTO "versions" VALUES(5,2,'ef455be7c5ecffbaebd14156fa775812ec9c18f38aea45dc58c4e64de3af3776','validating','b79606fb3afea5bd1609ed40b622142f1c98125abcfe89a76a661b0e8e343910',6,'74d2ded8084e42013329ce1d1094d986be02b75347f351d27dd19a2a5c532937',15,NULL,NULL,NULL,NULL,'{"kind": "upload", "wishes": {"activate": true, "allow_noop": false, "any_base": true}}',NULL,NULL,1.79568549907583904e+09,'carl',NULL);
INSERT INTO "versions" VALUES(6,2,'60ca7fe248ebc44b3a1e6d7af27e9d2471a88aecd0184b44bb4b807fd192dbb7','failed','b79606fb3afea5bd1609ed40b622142f1c98125abcfe89a76a661b0e8e343910',6,'e6f7022728770e5eb4d32ce02859e395193236c32f0cc9a22747dc11bcb3e368',14,NULL,NULL,NULL,NULL,'{"kind": "hub", "repo": "org/repo", "wishes": {"activate": false, "allow_noop": true, "any_base": false}}','no_effect','no module changes anything',1.79568549912658643e+09,'',1.79568549916661262e+09);
CREATE INDEX ix_versions_state ON versions (state);
CREATE INDEX ix_versions_config_sha256 ON versions (config_sha256);
CREATE INDEX ix_versions_weights_sha256 ON versions (weights_sha256);
CREATE INDEX ix_versions_prepared_sha256 ON versions (prepared_sha256);
CREATE INDEX ix_previous_versions_adapter_id ON previous_versions (adapter_id);
CREATE INDEX ix_previous_versions_version_id ON previous_versions (version_id);
CREATE INDEX ix_history_adapter_id_id ON history (adapter_id, id);
CREATE INDEX ix_training_files_server ON training_files (server);
CREATE INDEX ix_training_jobs_server_state ON training_jobs (server, state);
CREATE INDEX ix_training_jobs_training_file ON training_jobs (training_file);
CREATE INDEX ix_training_jobs_validation_file ON training_jobs (validation_file);
CREATE INDEX ix_training_events_job_number ON training_events (job, number);
COMMIT;
